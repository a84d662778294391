"""The formulas of SASA in MLX. modeling_sasa.py (runtime/formulas.py) explains them."""

import mlx.core as mx

WANTED, REFUSAL, END, OTHER = 0.0, -0.05, -0.1, -1.0
FAR = 1e30


def project(safety: mx.array, semantic: mx.array, epsilon: float) -> mx.array:
    h_s, h_f = safety.astype(mx.float32), semantic.astype(mx.float32)  # (batch, tokens, hidden)
    alpha = (h_s * h_f).sum(-1, keepdims=True) / mx.maximum((h_f * h_f).sum(-1, keepdims=True), epsilon)
    return (alpha * h_f).astype(semantic.dtype)  # (batch, tokens, hidden)


def unsafe_probability(state: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    found = (state.astype(mx.float32) * weight.astype(mx.float32)).sum(-1)
    return mx.sigmoid(found + bias.astype(mx.float32))  # (...), float32


def gate(logits: mx.array, wanted: mx.array, refused: mx.array, refusal: tuple[int, ...]) -> mx.array:
    far = min(mx.finfo(logits.dtype).max, FAR)
    others = mx.full((logits.shape[-1],), OTHER * far)  # (vocabulary,)
    others[mx.array(refusal)] = REFUSAL * far
    others[refusal[-1]] = END * far
    forced = mx.where(mx.arange(logits.shape[-1]) == wanted[..., None], WANTED, others)  # (batch, kept, vocabulary)
    return mx.where(refused[..., None], forced.astype(logits.dtype), logits)
