"""The differences between families in ONNX: the vision graph's inputs, position ids, and further inputs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from sasa_export.errors import EmitError
from sasa_export.onnx.flat import Shape
from sasa_export.onnx.towers import llava
from sasa_export.onnx.towers.lfm2 import Lfm2
from sasa_export.onnx.towers.llava_next import LlavaNext
from sasa_export.onnx.towers.pixtral import Mistral3
from sasa_export.onnx.towers.qwen import Qwen

# The inputs of a vision graph with their dimensions, and example arguments for tracing.
Inputs = tuple[dict[str, Shape], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Recipe:
    """How one family is exported.

    `tower(model)` returns the module behind vision_encoder.onnx; `inputs(model)` names its inputs, with an example.
    `position_axes` is 3 for M-RoPE. `extra` names further inputs of the decoder, and `optional` names inputs of the
    tower. A runtime may leave out both: they are then zero. `towers` are the types of vision tower that the module
    supports; empty for any.
    """

    tower: Callable[[Any], nn.Module]
    inputs: Callable[[Any], Inputs]
    position_axes: int = 1
    extra: dict[str, Shape] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    towers: tuple[str, ...] = ()


def recipe_of(model_type: str) -> Recipe:
    """Return the recipe of a stock model type. EmitError lists the supported types."""
    try:
        return RECIPES[model_type]
    except KeyError:
        raise EmitError(
            f"model type {model_type!r} has no ONNX recipe. Supported: {', '.join(sorted(RECIPES))}. "
            "Export it with --format safetensors, or add a recipe in sasa_export/onnx/recipes.py."
        ) from None


def check_tower(model_type: str, tower: str) -> None:
    """Raise EmitError where the recipe of a stock model type does not support this type of vision tower."""
    towers = recipe_of(model_type).towers
    if towers and tower not in towers:
        raise EmitError(
            f"the ONNX recipe of model type {model_type!r} is for a vision tower of type {' or '.join(towers)}, and "
            f"this model has one of type {tower}. Export it with --format safetensors."
        )


def _square_pictures(model: Any) -> Inputs:
    """Pictures of the tower's only size."""
    config = model.config.vision_config
    size = config.image_size
    shape = (getattr(config, "num_channels", 3), *(size if isinstance(size, list | tuple) else (size, size)))
    return {"pixel_values": ("num_images", *shape)}, (torch.ones(2, *shape),)


def _tiles(model: Any) -> Inputs:
    """LLaVA-NeXT: each picture as one whole tile and a grid of tiles, with the picture's size."""
    config = model.config.vision_config
    side = config.image_size
    count = 1 + max(height * width for height, width in model.config.image_grid_pinpoints) // side**2
    shape = (config.num_channels, side, side)
    named = {"pixel_values": ("num_images", "num_tiles", *shape), "image_sizes": ("num_images", 2)}
    return named, (torch.ones(2, count, *shape), torch.tensor([[side, 2 * side], [2 * side, side]]))


def _masked_tiles(model: Any) -> Inputs:
    """Idefics3 and SmolVLM: tiles with a mask of their pixels."""
    config = model.config.vision_config
    side = config.image_size
    named: dict[str, Shape] = {
        "pixel_values": ("batch_size", "num_images", config.num_channels, side, side),
        "pixel_attention_mask": ("batch_size", "num_images", side, side),
    }
    mask = torch.ones(2, 3, side, side, dtype=torch.bool)
    return named, (torch.ones(2, 3, config.num_channels, side, side), mask)


def _any_size(model: Any) -> Inputs:
    """Mistral 3: pictures padded to the largest one, and their sizes. Without sizes, no picture counts as padded."""
    config = model.config.vision_config
    cell = config.patch_size * model.config.spatial_merge_size
    shape = ("num_images", config.num_channels, "height", "width")
    sizes = torch.tensor([[2 * cell, 3 * cell], [3 * cell, 5 * cell]])
    pixels = torch.ones(2, config.num_channels, 3 * cell, 5 * cell)
    return {"pixel_values": shape, "image_sizes": ("num_images", 2)}, (pixels, sizes)


def _patches(model: Any, grid: str = "image_grid_thw") -> Inputs:
    """Qwen: the patches of all pictures in a row, and each picture's grid."""
    config = model.config.vision_config
    pixels = config.in_channels * config.temporal_patch_size * config.patch_size**2
    grids = torch.tensor([[1, 8, 4], [1, 4, 12]])
    named: dict[str, Shape] = {"pixel_values": ("num_patches", pixels), grid: ("num_images", 3)}
    return named, (torch.ones(8 * 4 + 4 * 12, pixels), grids)


def _padded_patches(model: Any) -> Inputs:
    """LFM2-VL: the patches of each picture, padded to equal numbers, and its grid."""
    config = model.config.vision_config
    pixels, factor = config.num_channels * config.patch_size**2, model.config.downsample_factor
    named: dict[str, Shape] = {
        "pixel_values": ("num_images", "num_patches", pixels), "spatial_shapes": ("num_images", 2),
        "pixel_attention_mask": ("num_images", "num_patches"),
    }  # fmt: skip
    grids = factor * torch.tensor([[2, 3], [4, 2]])
    mask = (torch.arange(9 * factor**2) < grids.prod(-1, keepdim=True)).long()  # (2, patches)
    return named, (torch.ones(*mask.shape, pixels), grids, mask)


RECIPES: dict[str, Recipe] = {
    "llava": Recipe(llava.Llava, _square_pictures, towers=("clip_vision_model", "siglip_vision_model")),
    "llava_next": Recipe(LlavaNext, _tiles, towers=("clip_vision_model",)),
    "smolvlm": Recipe(llava.Idefics3, _masked_tiles),
    "idefics3": Recipe(llava.Idefics3, _masked_tiles),
    # The input marks the tokens of a picture, which attend both ways. Without it, the mask is causal.
    "gemma3": Recipe(llava.Stock, _square_pictures, extra={"token_type_ids": ("batch_size", "sequence_length")}),
    "internvl": Recipe(llava.Stock, _square_pictures),
    "mistral3": Recipe(Mistral3, _any_size, optional=("image_sizes",), towers=("pixtral",)),
    # transformers.js calls the input grid_thw.
    "qwen2_vl": Recipe(Qwen, partial(_patches, grid="grid_thw"), position_axes=3),
    "qwen2_5_vl": Recipe(Qwen, _patches, position_axes=3),
    "qwen3_vl": Recipe(Qwen, _patches, position_axes=3),
    "lfm2_vl": Recipe(Lfm2, _padded_patches, towers=("siglip2_vision_model",)),
}
