"""Qwen2.5-VL's vision tower over pictures of any size, as one computation on all their patches.

The stock tower sorts the patches by window and attends window by window, in loops over numbers. Here the patches stay
where they are and a mask says who sees whom, which gives the same result and can be exported.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn


class Qwen25(nn.Module):
    """pixel_values (patches, pixels), image_grid_thw (images, 3) -> image_features (patches / merged, hidden)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.visual = model.model.visual
        self.merge = self.visual.spatial_merge_size
        self.window = self.visual.window_size // self.visual.patch_size  # patches along a window's side
        self.rotate = importlib.import_module(type(self.visual).__module__).apply_rotary_pos_emb_vision

    def forward(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        state = self.visual.patch_embed(pixel_values)  # (patches, hidden)
        frame, row, column = self._places(image_grid_thw, pixel_values.shape[0])  # (patches,) each
        window = torch.stack([frame, row // self.window, column // self.window], dim=-1)  # (patches, 3)
        same_frame = frame[:, None] == frame[None, :]  # (patches, patches)
        same_window = (window[:, None] == window[None, :]).all(-1)  # (patches, patches)
        tables = self.visual.rotary_pos_emb(state, torch.stack([row, column], dim=-1))
        for number, block in enumerate(self.visual.blocks):
            mask = same_frame if number in self.visual.fullatt_block_indexes else same_window
            state = state + self._attend(block.attn, block.norm1(state), tables, mask)
            state = state + block.mlp(block.norm2(state))
        return self.visual.merger(state)

    def _places(self, grids: torch.Tensor, patches: Any) -> tuple[torch.Tensor, ...]:
        """Each patch's frame, counted over all pictures, and its row and column, (patches,) each."""
        frames, height, width = grids.unbind(-1)  # (images,)
        ends = (frames * height * width).cumsum(0)  # (images,)
        number = torch.arange(patches)  # (patches,)
        image = (number[:, None] >= ends[None, :]).sum(-1)  # (patches,)
        starts = ends - frames * height * width  # (images,)
        before = frames.cumsum(0) - frames  # (images,), frames of the pictures before
        inside = number - starts[image]
        area, width = (height * width)[image], width[image]  # (patches,)
        frame, inside = before[image] + inside // area, inside % area
        # Patches come in squares of merge x merge, the squares row by row.
        square, corner = inside // self.merge**2, inside % self.merge**2
        across = width // self.merge
        row = square // across * self.merge + corner // self.merge
        column = square % across * self.merge + corner % self.merge
        return frame, row, column

    def _attend(
        self, attention: Any, state: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor
    ) -> torch.Tensor:
        """The block's attention, (patches, hidden), where `mask` (patches, patches) says who sees whom."""
        heads = attention.qkv(state).unflatten(-1, (3, attention.num_heads, -1))  # (patches, 3, heads, size)
        query, key, value = heads.unbind(1)  # (patches, heads, size)
        query, key = self.rotate(query, key, *tables)
        query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))  # (1, heads, patches, size)
        seen = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask[None, None], scale=attention.scaling
        )  # (1, heads, patches, size)
        return attention.proj(seen[0].transpose(0, 1).flatten(1))
