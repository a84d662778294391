"""The array operations of the verdict's rule, in MLX. modeling_sasa.py (runtime/arrays.py) explains them."""

from collections.abc import Sequence
from functools import partial

import mlx.core as mx

Array = mx.array
greater, where = mx.maximum, mx.where
taken, joined, largest = partial(mx.take_along_axis, axis=1), partial(mx.concatenate, axis=1), partial(mx.max, axis=-1)


def constant(values: Sequence[int], like: Array) -> Array:
    return mx.array(values)


def indices(count: int, like: Array) -> Array:
    return mx.arange(count)


def clipped(values: Array, least: int, most: int | None = None) -> Array:
    return mx.clip(values, least, most)


def whole(flags: Array) -> Array:
    return flags.astype(mx.int32)
