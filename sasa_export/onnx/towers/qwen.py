"""The vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL for pictures of any size, as one computation on all patches.

The stock towers attend frame by frame, and Qwen2.5-VL's window by window, in Python loops. Here, a mask says which
patches attend to each other. The result is the same, and can be exported.
"""

import importlib
from typing import Any

import torch
from torch import nn

from sasa_export.onnx.flat import Inputs, Shape


class Qwen(nn.Module):
    """pixel_values (patches, pixels), image_grid_thw (images, 3) -> image_features (patches / merged, width).

    The width is the decoder's. A tower with features for the first blocks (Qwen3-VL's deepstack) gives a multiple: the
    decoder's input first, then the features that are added after each of those blocks.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.visual = model.model.visual
        self.merge = self.visual.spatial_merge_size
        self.deep = list(getattr(self.visual, "deepstack_visual_indexes", ()))
        self.windowed = set[int]()  # blocks
        if hasattr(self.visual, "window_size"):
            self.window = self.visual.window_size // self.visual.patch_size  # patches along a window's side
            self.windowed = set(range(len(self.visual.blocks))) - set(self.visual.fullatt_block_indexes)
        self.rotate = importlib.import_module(type(self.visual).__module__).apply_rotary_pos_emb_vision

    @staticmethod
    def inputs(model: Any) -> Inputs:
        """The patches of all pictures are in a row."""
        config = model.config.vision_config
        pixels = config.in_channels * config.temporal_patch_size * config.patch_size**2
        grids = torch.tensor([[1, 8, 4], [1, 4, 12]])
        named: dict[str, Shape] = {"pixel_values": ("num_patches", pixels), "image_grid_thw": ("num_images", 3)}
        return named, (torch.ones(8 * 4 + 4 * 12, pixels), grids)

    def forward(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        state = self.visual.patch_embed(pixel_values)  # (patches, hidden)
        image, frame, row, column = self._places(image_grid_thw, pixel_values.shape[0])  # (patches,) each
        if hasattr(self.visual, "pos_embed"):
            sizes = image_grid_thw[image, 1:]  # (patches, 2)
            state = state + self._learned(torch.stack([row, column], dim=-1), sizes).to(state.dtype)
        same_frame = frame[:, None] == frame[None, :]  # (patches, patches)
        same_window = same_frame
        if self.windowed:
            window = torch.stack([frame, row // self.window, column // self.window], dim=-1)  # (patches, 3)
            same_window = (window[:, None] == window[None, :]).all(-1)  # (patches, patches)
        tables = self.visual.rotary_pos_emb(state, torch.stack([row, column], dim=-1))
        further = []
        for number, block in enumerate(self.visual.blocks):
            mask = same_window if number in self.windowed else same_frame
            state = state + self._attend(block.attn, block.norm1(state), tables, mask)
            state = state + block.mlp(block.norm2(state))
            if number in self.deep:
                further.append(self.visual.deepstack_merger_list[self.deep.index(number)](state))
        return torch.cat([self.visual.merger(state), *further], dim=-1)

    def _learned(self, places: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """Return the positions at places (patches, 2) of grids of `sizes` (patches, 2), interpolated in the learned
        square: (patches, hidden)."""
        side = self.visual.num_grid_per_side
        source = places.float() * (side - 1) / (sizes - 1).clamp_min(1)  # (patches, 2)
        low = source.floor()  # (patches, 2)
        part = source - low  # (patches, 2)
        corners = []
        for down in (0, 1):
            for right in (0, 1):
                step = torch.tensor([down, right])
                place = (low.long() + step).clamp_max(side - 1)  # (patches, 2)
                weight = torch.where(step == 1, part, 1 - part).prod(-1, keepdim=True)  # (patches, 1)
                corners.append(self.visual.pos_embed(place[:, 0] * side + place[:, 1]) * weight)
        return torch.stack(corners).sum(0)

    def _places(self, grids: torch.Tensor, patches: Any) -> tuple[torch.Tensor, ...]:
        """Return each patch's picture, frame (counted over all pictures), row and column, (patches,) each."""
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
        return image, frame, row, column

    def _attend(
        self, attention: Any, state: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor
    ) -> torch.Tensor:
        """Return the block's attention, (patches, hidden). `mask`, (patches, patches), marks pairs that may attend."""
        heads = attention.qkv(state).unflatten(-1, (3, attention.num_heads, -1))  # (patches, 3, heads, size)
        query, key, value = heads.unbind(1)  # (patches, heads, size)
        query, key = self.rotate(query, key, *tables)
        query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))  # (1, heads, patches, size)
        seen = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask[None, None], scale=attention.scaling
        )  # (1, heads, patches, size)
        return attention.proj(seen[0].transpose(0, 1).flatten(1))
