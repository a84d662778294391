"""The array operations of the verdict's rule, and the formulas of SASA, in MLX. modeling_sasa.py explains them."""

from functools import partial

import mlx.core as mx

Array, where, greater, clipped = mx.array, mx.where, mx.maximum, mx.clip
joined, largest = partial(mx.concatenate, axis=1), partial(mx.max, axis=-1)
WANTED, REFUSAL, END, OTHER, FAR = 0.0, -0.05, -0.1, -1.0, 1e30


def constant(values: tuple[int, ...], like: Array) -> Array:
    return mx.array(values)


def indices(count: int, like: Array) -> Array:
    return mx.arange(count)


def project(safety: Array, semantic: Array, epsilon: float) -> Array:
    h_s, h_f = safety.astype(mx.float32), semantic.astype(mx.float32)  # (batch, tokens, hidden)
    alpha = (h_s * h_f).sum(-1, keepdims=True) / mx.maximum((h_f * h_f).sum(-1, keepdims=True), epsilon)
    return (alpha * h_f).astype(semantic.dtype)  # (batch, tokens, hidden)


def unsafe_probability(state: Array, weight: Array, bias: Array) -> Array:
    return mx.sigmoid((state.astype(mx.float32) * weight.astype(mx.float32)).sum(-1) + bias.astype(mx.float32))


def gate(logits: Array, wanted: Array, refused: Array, refusal: tuple[int, ...]) -> Array:
    far = min(mx.finfo(logits.dtype).max, FAR)
    others = mx.full((logits.shape[-1],), OTHER * far)  # (vocabulary,)
    others[mx.array(refusal)] = REFUSAL * far
    others[refusal[-1]] = END * far
    forced = mx.where(mx.arange(logits.shape[-1]) == wanted[..., None], WANTED, others)  # (batch, kept, vocabulary)
    return mx.where(refused[..., None], forced.astype(logits.dtype), logits)
