"""LLaVA-NeXT's vision tower. The features of a picture's tiles form one grid, which is cropped to the picture.

The stock model does this picture by picture with Python numbers. A graph needs the same as arithmetic on tensors.
"""

from typing import Any

import torch
from torch import nn

from sasa_export.onnx.flat import Inputs, Shape
from sasa_export.onnx.towers.llava import Llava


class LlavaNext(nn.Module):
    """Tiles and picture sizes -> image_features (image tokens, hidden)."""

    pinpoints: torch.Tensor  # (pinpoints, 2), height and width in pixels

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tiles = Llava(model)
        self.newline: Any = model.model.image_newline  # (hidden,)
        config = model.config
        self.side = config.vision_config.image_size  # pixels of a tile
        self.cells = self.side // config.vision_config.patch_size  # features along a tile's side
        self.base = self.cells**2 + (not self.tiles.drops_class_token)  # features of a whole tile
        self.register_buffer("pinpoints", torch.tensor(config.image_grid_pinpoints), persistent=False)
        self.rows, self.columns = (self.pinpoints.amax(0) // self.side * self.cells).tolist()

    @staticmethod
    def inputs(model: Any) -> Inputs:
        """Each picture comes as one whole tile and a grid of tiles, with the picture's size."""
        config = model.config.vision_config
        side = config.image_size
        count = 1 + max(height * width for height, width in model.config.image_grid_pinpoints) // side**2
        shape = (config.num_channels, side, side)
        named: dict[str, Shape] = {
            "pixel_values": ("num_images", "num_tiles", *shape), "image_sizes": ("num_images", 2)
        }  # fmt: skip
        return named, (torch.ones(2, count, *shape), torch.tensor([[side, 2 * side], [2 * side, side]]))

    def forward(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> torch.Tensor:
        """pixel_values (images, tiles, channels, height, width), image_sizes (images, 2), height and width."""
        count = pixel_values.shape[1]
        features = self.tiles(pixel_values.flatten(0, 1))  # (images * tiles, base, hidden)
        features = features.unflatten(0, (-1, count)).flatten(1, 2)  # (images, tiles * base, hidden)
        ending = self.newline.expand(features.shape[0], 1, -1)  # (images, 1, hidden)
        # The newline follows the last tile, where the grid's index finds it.
        features = torch.cat([features, ending], dim=1)  # (images, tiles * base + 1, hidden)
        index, used = self._grid(image_sizes, count * self.base)  # (images, places)
        chosen = features.gather(1, index[..., None].expand(-1, -1, features.shape[-1]))
        return chosen[used]  # (image tokens, hidden)

    def _grid(self, sizes: torch.Tensor, newline: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the index of the feature at each place, (images, places), and which places are used."""
        grid = self._resolution(sizes) // self.side  # (images, 2), in tiles
        whole = grid * self.cells  # (images, 2), rows and columns before cropping
        crop = self._crop(sizes, whole)  # (images, 2), rows and columns to cut off on either side
        kept = whole - 2 * crop  # (images, 2)
        row = torch.arange(self.rows)[None, :, None]  # (1, rows, 1)
        column = torch.arange(self.columns + 1)[None, None, :]  # (1, 1, columns + 1)
        used = (row < kept[:, 0, None, None]) & (column <= kept[:, 1, None, None])  # (images, rows, columns + 1)
        top, left = row + crop[:, 0, None, None], column + crop[:, 1, None, None]
        tile = top // self.cells * grid[:, 1, None, None] + left // self.cells + 1  # tile 0 is the whole picture
        inside = top % self.cells * self.cells + left % self.cells
        place = tile * self.base + inside  # (images, rows, columns + 1)
        place = torch.where(used & (column < kept[:, 1, None, None]), place, newline)
        first = torch.arange(self.base).expand(sizes.shape[0], -1)  # (images, base)
        index = torch.cat([first, place.flatten(1)], dim=1)
        return index, torch.cat([torch.ones_like(first, dtype=torch.bool), used.flatten(1)], dim=1)

    def _resolution(self, sizes: torch.Tensor) -> torch.Tensor:
        """Return the stock model's grid of tiles for each picture, (images, 2), height and width in pixels."""
        points = self.pinpoints[None]  # (1, pinpoints, 2)
        original = sizes[:, None]  # (images, 1, 2)
        scale = (points.double() / original.double()).amin(-1, keepdim=True)  # (images, pinpoints, 1)
        scaled = (original.double() * scale).long().prod(-1)  # (images, pinpoints)
        effective = torch.minimum(scaled, original.prod(-1))
        wasted = points.prod(-1) - effective
        # One number to maximise: it ranks by the largest effective area, then the least waste, then the first.
        order = torch.arange(points.shape[1])
        score = (effective * 2**24 - wasted) * 64 - order  # (images, pinpoints)
        return self.pinpoints[score.argmax(-1)]

    def _crop(self, sizes: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """Return the rows and columns that the stock unpad_image cuts off on either side, (images, 2)."""
        height, width = sizes.double().unbind(-1)  # (images,)
        rows, columns = whole.double().unbind(-1)  # (images,)
        wide = width / height > columns / rows
        new_rows = (height * (columns / width) + 1e-7).floor()
        new_columns = (width * (rows / height) + 1e-7).floor()
        cut_rows = torch.where(wide, ((rows - new_rows) / 2).floor(), 0.0)
        cut_columns = torch.where(wide, 0.0, ((columns - new_columns) / 2).floor())
        return torch.stack([cut_rows, cut_columns], dim=-1).long()
