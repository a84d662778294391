"""The array operations of the verdict's rule, in torch. The version for MLX has the same names."""

from collections.abc import Sequence

import torch
from torch import Tensor

Array = Tensor
where, greater = torch.where, torch.maximum
clipped = torch.clamp  # of values, the least and the most; None sets no limit


def constant(values: Sequence[int], like: Array) -> Array:
    """Return these numbers as an array (values,) on the device of `like`."""
    return torch.tensor(values, device=like.device)


def indices(count: int, like: Array) -> Array:
    """Return 0, 1, 2 ..., (count,), on the device of `like`."""
    return torch.arange(count, device=like.device)


def joined(parts: Sequence[Array]) -> Array:
    """Return parts (batch, ...) concatenated along their second axis."""
    return torch.cat(list(parts), dim=1)


def largest(values: Array) -> Array:
    """Return the largest value along the last axis."""
    return values.amax(-1)
