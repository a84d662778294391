"""Mistral 3's vision tower, Pixtral, for pictures of several sizes, padded to the largest.

The stock tower cuts off the padding and puts all patches into one row, with Python numbers. Here, each picture keeps
its padded grid. No patch attends to padding, and the tokens of padding are dropped at the end.
"""

from typing import Any

import torch
from torch import nn

from sasa_export.onnx.flat import Inputs, Shape


class Mistral3(nn.Module):
    """pixel_values (images, channels, height, width), image_sizes (images, 2) -> image_features (tokens, hidden)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector
        self.patch, self.merge = self.tower.patch_size, model.config.spatial_merge_size
        layers = model.config.vision_feature_layer
        self.layers = [layers] if isinstance(layers, int) else list(layers)

    @staticmethod
    def inputs(model: Any) -> Inputs:
        """Pictures are padded to the largest one. Without sizes, no picture counts as padded."""
        config = model.config.vision_config
        cell = config.patch_size * model.config.spatial_merge_size
        sizes = torch.tensor([[2 * cell, 3 * cell], [3 * cell, 5 * cell]])
        pixels = torch.ones(2, config.num_channels, 3 * cell, 5 * cell)
        shape: Shape = ("num_images", config.num_channels, "height", "width")
        return {"pixel_values": shape, "image_sizes": ("num_images", 2)}, (pixels, sizes)

    def forward(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> torch.Tensor:
        """Sizes are (height, width) in pixels; 0 means that a picture is not padded."""
        grid = self.tower.patch_conv(pixel_values)  # (images, hidden, rows, columns)
        rows, columns = grid.shape[-2:]
        whole = torch.tensor([rows, columns])  # (2,)
        sizes = torch.where(image_sizes == 0, whole, image_sizes // self.patch)  # (images, 2), in patches
        row, column = torch.arange(rows), torch.arange(columns)
        used = (row[:, None] < sizes[:, 0, None, None]) & (column < sizes[:, 1, None, None])  # (images, rows, columns)
        places = torch.stack([row[:, None].expand(rows, columns), column.expand(rows, columns)], dim=-1).flatten(0, 1)
        features = self._encode(grid.flatten(2).transpose(1, 2), used.flatten(1), places)  # (images, patches, hidden)
        merged = self._merge(self.projector.norm(features).unflatten(1, (rows, columns)))  # (images, cells, hidden)
        real = used[:, :: self.merge, :: self.merge].flatten(1).expand(merged.shape[:2])  # (images, cells)
        tokens = self.projector.patch_merger.merging_layer(merged[real])  # (tokens, hidden)
        return self.projector.linear_2(self.projector.act(self.projector.linear_1(tokens)))

    def _encode(self, patches: torch.Tensor, used: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Run the tower's layers on patches (images, patches, hidden) at places (patches, 2). `used` (images, patches)
        marks real patches. Return the chosen layers' outputs, joined: (images, patches, layers * hidden)."""
        state = self.tower.ln_pre(patches)
        tables = self.tower.patch_positional_embedding(state, places)
        mask = used[:, None, None, :].expand(-1, -1, used.shape[1], -1)  # (images, 1, patches, patches): only real keys
        states = [state]
        for layer in self.tower.transformer.layers:
            states.append(layer(states[-1], attention_mask=mask, position_embeddings=tables))
        return torch.cat([states[layer] for layer in self.layers], dim=-1)

    def _merge(self, grid: torch.Tensor) -> torch.Tensor:
        """Join squares of patches of a grid (images, rows, columns, hidden), in the order of the stock unfold. Return
        (images, cells, hidden * merge * merge)."""
        square = (-1, self.merge)
        cells = grid.unflatten(2, square).unflatten(1, square)  # (images, rows, merge, columns, merge, hidden)
        return cells.permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2)
