"""The vision tower and projector of smol-llava, apart from the language model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from sasa_export.models.smol_llava import FILES


class Patches(nn.Conv2d):
    """A convolution over patches that do not overlap, as one matrix product: far cheaper to go back through."""

    def forward(self, pixels: Tensor) -> Tensor:
        """(batch, 3, height, width) -> (batch, channels, rows, columns)"""
        batch, colours, height, width = pixels.shape
        side = self.kernel_size[0]
        cut = pixels.reshape(batch, colours, height // side, side, width // side, side)
        patches = cut.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (batch, rows, columns, 3 * side * side)
        return nn.functional.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class Tower(nn.Module):
    """Pictures to image tokens; the parameter names are those of the whole model without `model.`."""

    def __init__(self) -> None:
        super().__init__()
        settings = LlavaConfig.from_pretrained(FILES)
        self.vision_tower = CLIPVisionModel(settings.vision_config)
        self.vision_tower.embeddings.patch_embedding.__class__ = Patches
        self.multi_modal_projector = LlavaMultiModalProjector(settings)

    def forward(self, pixels: Tensor) -> Tensor:
        """(batch, 3, 384, 384) -> (batch, 64, 576)"""
        states = self.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]  # (batch, 65, 512)
        features: Tensor = self.multi_modal_projector(states[:, 1:])  # without CLS
        return features

    def load(self, file: Path) -> Tower:
        """Take the weights of `file` (names as in the whole model)."""
        self.load_state_dict({k.removeprefix("model."): v.float() for k, v in load_file(file).items()})
        return self

    def save(self, file: Path) -> None:
        """Write the weights to `file` in float16, beside it first."""
        weights: dict[str, Any] = {f"model.{k}": v.half().contiguous() for k, v in self.state_dict().items()}
        beside = file.with_name(file.name + ".part")
        save_file(weights, beside)
        os.replace(beside, file)


@torch.no_grad()
def read(tower: Tower, pixels: Tensor, batch: int = 24) -> Tensor:
    """Image tokens of many pictures: (pictures, 64, 576)."""
    return torch.cat([tower(part) for part in pixels.split(batch)])
