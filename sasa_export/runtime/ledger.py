"""What the cache keeps of a token.

A verdict must not depend on how a prompt is fed, so the gate keeps a ledger: for each token a few small integers
and its projected state, packed into extra layers of the KV cache, after the model's own. Beams, batches, crops and
resets carry it as they carry keys and values, and the second lane can run over the whole context at any call. All
integers stay below 256, which every float type holds exactly.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sasa_export.runtime.nodes import EVERY_TOKEN, lane_entries

# Its columns. STATE is 0, or k + 1 where token k of the refusal is due; JUDGED is 1 where a verdict covers the token.
STATE, SYMBOL, REAL, PICTURE, JUDGED, POSITION = range(6)
DIGITS, BASE = 3, 128  # of a position, one column each


@dataclass(frozen=True)
class Ledger:
    """The shape of the ledger for one decoder."""

    first: int  # index of the first extra cache layer
    heads: int
    size: int  # of a head
    hidden: int  # of all projected states
    axes: int  # of a position: three in families with M-RoPE
    lanes: int  # each has a projected state

    @classmethod
    def of(cls, text: Any, sasa: dict[str, Any]) -> "Ledger":
        """The ledger of a text configuration. A lane that keeps its own cache needs no projected states in it."""
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        axes = 3 if "mrope_section" in (getattr(text, "rope_parameters", None) or {}) else 1
        lanes = len(lane_entries(sasa["graph"]))
        hidden = 0 if sasa["gate"] == EVERY_TOKEN else lanes * text.hidden_size
        return cls(text.num_hidden_layers, text.num_key_value_heads, size, hidden, axes, lanes)

    @property
    def columns(self) -> int:
        return POSITION + self.axes * DIGITS

    @property
    def layers(self) -> int:
        """How many cache layers hold it."""
        return -(-(self.columns + self.hidden) // (2 * self.heads * self.size))

    def pack(self, columns: torch.Tensor, projection: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        """Columns (batch, tokens, columns) and projection (batch, tokens, hidden) as keys, values, keys, values ...

        Each is (batch, heads, tokens, size), like those of every other layer.
        """
        flat = torch.cat([columns.to(dtype), projection.to(dtype)], dim=-1)  # (batch, tokens, columns + hidden)
        room = 2 * self.layers * self.heads * self.size
        flat = nn.functional.pad(flat, (0, room - flat.shape[-1]))  # (batch, tokens, room)
        flat = flat.unflatten(-1, (2 * self.layers * self.heads, self.size))
        return list(flat.transpose(1, 2).split(self.heads, dim=1))

    def unpack(self, tensors: list[torch.Tensor], start: int, stop: int) -> torch.Tensor:
        """The places start..stop-1 of every token's row: (batch, tokens, stop - start)."""
        width = self.heads * self.size
        parts = []
        for index in range(start // width, -(-stop // width)):
            low, high = max(start - index * width, 0), min(stop - index * width, width)
            heads = tensors[index][:, low // self.size : -(-high // self.size)]  # (batch, heads, tokens, size)
            rows = heads.transpose(1, 2).flatten(2)  # (batch, tokens, heads * size)
            skipped = low // self.size * self.size
            parts.append(rows[..., low - skipped : high - skipped])
        return torch.cat(parts, dim=-1)

    def unpack_columns(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """(batch, tokens, columns), int64."""
        return self.unpack(tensors, 0, self.columns).round().long()

    def unpack_projection(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """(batch, tokens, hidden)."""
        return self.unpack(tensors, self.columns, self.columns + self.hidden)

    def digits(self, positions: torch.Tensor) -> torch.Tensor:
        """Positions (axes, batch, tokens) as columns (batch, tokens, axes * digits)."""
        steps = torch.tensor([BASE**-power for power in range(DIGITS)], device=positions.device)  # (digits,), exact
        found = torch.fmod(torch.floor(positions[..., None].float() * steps), BASE)
        return found.permute(1, 2, 0, 3).flatten(2)

    def positions(self, columns: torch.Tensor) -> torch.Tensor:
        """The positions that all columns (batch, tokens, columns) hold: (batch, tokens), or (axes, batch, tokens)."""
        digits = columns[..., POSITION:].unflatten(-1, (self.axes, DIGITS))  # (batch, tokens, axes, digits)
        found = sum(digits[..., power] * BASE**power for power in range(DIGITS)).permute(2, 0, 1)
        return found[0] if self.axes == 1 else found
