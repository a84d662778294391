"""The ledger: what the gate keeps of each token, namely integers below 256, exact in any type, and a projected state.

It is packed into extra layers of the KV cache, behind the model's own. Code that copies, repeats or crops a cache
therefore carries the ledger along. With it, the gate can judge the whole context, however calls split it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Columns. STATE is 0, or k + 1 where token k of the refusal is due. The verdict defines TURN and NUMBER. PICTURE is the
# token's type in families that mark pictures by it. At POSITION, digits of the position begin.
STATE, TURN, NUMBER, PICTURE, POSITION = range(5)
DIGITS, BASE = 3, 128  # digits of a position, one column each, since bfloat16 is exact up to 256 only
SHIFT = BASE**DIGITS // 2  # added to positions, since some families have negative ones


class Ledger(NamedTuple):
    """The layout of the ledger for one decoder."""

    first: int  # index of the first extra cache layer
    heads: int
    size: int  # width of a head
    hidden: int
    axes: int  # axes of a position: three in families with M-RoPE

    @classmethod
    def of(cls, text: Any) -> "Ledger":
        block = (getattr(text, "per_layer_config", None) or [text])[0]  # where head sizes differ between blocks
        size = getattr(block, "head_dim", None) or text.hidden_size // text.num_attention_heads
        axes = 3 if "mrope_section" in (getattr(text, "rope_parameters", None) or {}) else 1
        return cls(text.num_hidden_layers, block.num_key_value_heads, size, text.hidden_size, axes)

    @property
    def columns(self) -> int:
        return POSITION + self.axes * DIGITS

    @property
    def layers(self) -> int:
        """The number of cache layers that hold the ledger."""
        return -(-(self.columns + self.hidden) // (2 * self.heads * self.size))

    def empty(self, like: Tensor) -> list[Tensor]:
        """Return the ledger of zero tokens, for states like these (batch, tokens, hidden)."""
        return [like.new_zeros(like.shape[0], self.heads, 0, self.size)] * (2 * self.layers)

    def pack(self, columns: Tensor, projection: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """Return columns (batch, tokens, columns) and projection (batch, tokens, hidden) as keys, values, keys, values
        .... Each is (batch, heads, tokens, size), as in every other layer."""
        flat = torch.cat([columns.to(dtype), projection.to(dtype)], dim=-1)  # (batch, tokens, columns + hidden)
        width = 2 * self.layers * self.heads * self.size
        flat = nn.functional.pad(flat, (0, width - flat.shape[-1])).unflatten(-1, (-1, self.size))
        return list(flat.transpose(1, 2).split(self.heads, dim=1))

    def unpack(self, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Reverse `pack`: return columns (batch, tokens, columns), int64, and projection (batch, tokens, hidden)."""
        flat = torch.cat(tensors, dim=1).transpose(1, 2).flatten(2)  # (batch, tokens, width)
        return flat[..., : self.columns].round().long(), flat[..., self.columns : self.columns + self.hidden]

    def tail(self, tensors: list[Tensor], count: int) -> Tensor:
        """Return STATE, TURN and NUMBER of the last `count` tokens, (batch, count, 3), int64; 0 for missing tokens."""
        kept = tensors[0][:, 0, :, : NUMBER + 1]  # (batch, past, 3)
        return nn.functional.pad(kept, (0, 0, count, 0))[:, kept.shape[1] :].round().long()

    def digits(self, positions: Tensor) -> Tensor:
        """Return positions (axes, batch, tokens) as columns (batch, tokens, axes * digits)."""
        steps = torch.tensor([BASE**-power for power in range(DIGITS)], device=positions.device)  # (digits,), exact
        found = torch.fmod(torch.floor((positions[..., None] + SHIFT).float() * steps), BASE)
        return found.permute(1, 2, 0, 3).flatten(2)

    def positions(self, columns: Tensor) -> Tensor:
        """Return the positions in columns (batch, tokens, columns): (batch, tokens), or (axes, batch, tokens)."""
        digits = columns[..., POSITION:].unflatten(-1, (self.axes, DIGITS))  # (batch, tokens, axes, digits)
        found = sum(digits[..., power] * BASE**power for power in range(DIGITS)).permute(2, 0, 1)
        return (found[0] if self.axes == 1 else found) - SHIFT
