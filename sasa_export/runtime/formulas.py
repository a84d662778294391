"""The formulas of SASA (arXiv 2507.21637). h_s and h_f are the outputs of safety layer s and semantic layer f.

project(h_s, h_f)     = <h_s, h_f> / max(|h_f|^2, epsilon) * h_f       # (batch, tokens, hidden), float32
second_lane(p)        = norm(block_{L-1}(... block_{s+1}(p)))[judged]  # (batch, hidden), the main lane's weights
states(h_s, h_f)      = norm(h_s)[judged], norm(h_f)[judged]           # (batch, hidden) each
unsafe_probability(x) = sigmoid(w . x + b)                             # (batch,), x: lane and states, side by side
gate(logits, verdict) = logits, or the next token of the refusal       # (batch, kept, vocabulary)
"""

import torch
from torch import Tensor

# Logits of a refused row, as shares of the largest number of their type, at most FAR. Temperature and penalties do not
# close such wide gaps, and sums over beams stay finite. Where an option forbids the wanted token, their order selects
# another token of the refusal, then the end of sequence.
WANTED, REFUSAL, END, OTHER = 0.0, -0.05, -0.1, -1.0
FAR = 1e30


def project(safety: Tensor, semantic: Tensor, epsilon: float) -> Tensor:
    """Return the component of the safety state along the semantic state, token by token (the paper's Eq. 8). It is
    computed in float32, since |h_f|^2 overflows half precision at massive activations."""
    h_s, h_f = safety.float(), semantic.float()  # (batch, tokens, hidden)
    alpha = (h_s * h_f).sum(-1, keepdim=True) / (h_f * h_f).sum(-1, keepdim=True).clamp_min(epsilon)
    return (alpha * h_f).to(semantic.dtype)  # (batch, tokens, hidden)


def unsafe_probability(state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return P(unsafe), (...), float32, by logistic regression on the probe's input `state` (..., features)."""
    return torch.sigmoid((state.float() * weight.float()).sum(-1) + bias.float())


def gate(logits: Tensor, wanted: Tensor, refused: Tensor, refusal: tuple[int, ...]) -> Tensor:
    """Force logits (batch, kept, vocabulary) to the `wanted` token at `refused` positions, (batch, kept) both. Other
    positions keep their logits. `refusal` holds token ids, the end of sequence last."""
    far = min(torch.finfo(logits.dtype).max, FAR)
    others = torch.full(logits.shape[-1:], OTHER * far, dtype=logits.dtype, device=logits.device)  # (vocabulary,)
    others[list(refusal)] = REFUSAL * far
    others[refusal[-1]] = END * far
    forced = others.expand_as(logits).scatter(-1, wanted.unsqueeze(-1), WANTED)  # (batch, kept, vocabulary)
    return torch.where(refused.unsqueeze(-1), forced, logits)
