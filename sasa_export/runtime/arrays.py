"""The array operations of the verdict's rule, in torch. The version for MLX has the same names."""

from collections.abc import Sequence

import torch
from torch import Tensor

Array = Tensor
greater, where = torch.maximum, torch.where


def constant(values: Sequence[int], like: Array) -> Array:
    """Return these numbers as an array (values,) on the device of `like`."""
    return torch.tensor(values, device=like.device)


def indices(count: int, like: Array) -> Array:
    """Return 0, 1, 2 ..., (count,), on the device of `like`."""
    return torch.arange(count, device=like.device)


def clipped(values: Array, least: int, most: int | None = None) -> Array:
    """Return the values limited to the range from `least` to `most`. None sets no upper limit."""
    return values.clamp(least, most)


def taken(values: Array, index: Array) -> Array:
    """Return the entries of values (batch, tokens) at the indices (batch, wanted)."""
    return values.gather(1, index)


def joined(parts: Sequence[Array]) -> Array:
    """Return parts (batch, ...) concatenated along their second axis."""
    return torch.cat(list(parts), dim=1)


def largest(values: Array) -> Array:
    """Return the largest value along the last axis."""
    return values.amax(-1)


def whole(flags: Array) -> Array:
    """Return boolean flags as the integers 0 and 1."""
    return flags.long()
