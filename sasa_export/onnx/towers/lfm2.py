"""LFM2-VL's vision tower, SigLIP 2, for pictures of several sizes, whose patches are padded to equal numbers.

The stock model resizes its learned positions and removes the padding picture by picture. Here, a table of weights
resizes the positions for all pictures at once, and an index finds the patches of each token.
"""

from typing import Any

import torch
from torch import nn

from sasa_export.onnx.flat import Inputs, Shape


class Lfm2(nn.Module):
    """Patches of pictures, and each picture's grid of them -> image_features (tokens, hidden)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector
        self.side = self.tower.embeddings.position_embedding_size  # of the square of learned positions
        self.factor = self.projector.factor  # patches along the side of the square of one token

    @staticmethod
    def inputs(model: Any) -> Inputs:
        """The patches of each picture are padded to equal numbers."""
        config = model.config.vision_config
        pixels, factor = config.num_channels * config.patch_size**2, model.config.downsample_factor
        named: dict[str, Shape] = {
            "pixel_values": ("num_images", "num_patches", pixels), "spatial_shapes": ("num_images", 2),
            "pixel_attention_mask": ("num_images", "num_patches"),
        }  # fmt: skip
        grids = factor * torch.tensor([[2, 3], [4, 2]])
        mask = (torch.arange(9 * factor**2) < grids.prod(-1, keepdim=True)).long()  # (2, patches)
        return named, (torch.ones(*mask.shape, pixels), grids, mask)

    def forward(
        self, pixel_values: torch.Tensor, spatial_shapes: torch.Tensor, pixel_attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """pixel_values: (images, patches, pixels). spatial_shapes: (images, 2), rows and columns of real patches.
        pixel_attention_mask: (images, patches), nonzero for real patches."""
        count = pixel_values.shape[1]
        patches = self.tower.embeddings.patch_embedding(pixel_values)  # (images, patches, hidden)
        state = patches + self._positions(spatial_shapes, count).to(patches.dtype)
        mask = (pixel_attention_mask != 0)[:, None, None, :].expand(-1, 1, count, -1)  # (images, 1, patches, patches)
        for layer in self.tower.encoder.layers:
            state = layer(state, mask)
        squares = self._squares(self.tower.post_layernorm(state), spatial_shapes)  # (tokens, hidden * factor ** 2)
        if self.projector.use_layer_norm:
            squares = self.projector.layer_norm(squares)
        return self.projector.linear_2(self.projector.act(self.projector.linear_1(squares)))

    def _positions(self, shapes: torch.Tensor, count: Any) -> torch.Tensor:
        """Return the learned positions, resized to each picture's grid, (images, patches, hidden)."""
        number = torch.arange(count)  # (patches,)
        rows, columns = shapes[:, :1], shapes[:, 1:]  # (images, 1)
        row = torch.minimum(number // columns, rows - 1)  # (images, patches); padding is like the last row
        down = self._weights(row, rows)  # (images, patches, side)
        across = self._weights(number % columns, columns)  # (images, patches, side)
        weights = (down[..., :, None] * across[..., None, :]).flatten(2)  # (images, patches, side ** 2)
        return weights @ self.tower.embeddings.position_embedding.weight.float()

    def _weights(self, place: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        """Return the weight of each learned position for places (images, patches) along a side of `size` (images, 1):
        (images, patches, side). The weights are those of torch's antialiased bilinear interpolation."""
        scale = self.side / size.float()  # (images, 1), learned places for each new one
        center = ((place + 0.5) * scale)[..., None]  # (images, patches, 1)
        away = (torch.arange(self.side) + 0.5 - center).abs()  # (images, patches, side)
        found = (1 - away / scale.clamp_min(1)[..., None]).clamp_min(0)  # (images, patches, side), a triangle
        return found / found.sum(-1, keepdim=True)

    def _squares(self, state: torch.Tensor, shapes: torch.Tensor) -> torch.Tensor:
        """Join the patches (images, patches, hidden) of each square, and return (tokens, hidden * factor ** 2)."""
        rows, columns = shapes[:, :1] // self.factor, shapes[:, 1:] // self.factor  # (images, 1), in squares
        number = torch.arange(state.shape[1] // self.factor**2)  # (squares,)
        top, left = number // columns * self.factor, number % columns * self.factor  # (images, squares)
        inside = torch.arange(self.factor**2)  # (factor ** 2,)
        row = top[..., None] + inside // self.factor  # (images, squares, factor ** 2)
        place = row * shapes[:, 1, None, None] + left[..., None] + inside % self.factor
        used = number < rows * columns  # (images, squares)
        place = torch.where(used[..., None], place, 0).flatten(1)  # (images, squares * factor ** 2)
        taken = state.gather(1, place[..., None].expand(-1, -1, state.shape[-1]))
        return taken.unflatten(1, (-1, self.factor**2)).flatten(2)[used]
