"""What differs between families in ONNX: the vision graph's inputs, position ids, and further inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from sasa_export.errors import EmitError
from sasa_export.writers.onnx import vision
from sasa_export.writers.onnx.decoder import Signature, deep_features
from sasa_export.writers.onnx.vision_lfm2 import Lfm2
from sasa_export.writers.onnx.vision_llava_next import LlavaNext
from sasa_export.writers.onnx.vision_pixtral import Mistral3
from sasa_export.writers.onnx.vision_qwen import Qwen


@dataclass(frozen=True)
class Recipe:
    """How one family is exported.

    `tower(model)` is the module behind vision_encoder.onnx, `inputs(model)` gives its example arguments and its
    signature. `position_axes` is 3 for M-RoPE, `extra` names further inputs of the decoder, which a runtime may
    leave out: they are zero then. So are those inputs of the tower that `optional` names. `towers` are the types of
    vision tower that the module is right for; empty for any.
    """

    tower: Callable[[Any], nn.Module]
    inputs: Callable[[Any], tuple[tuple[torch.Tensor, ...], Signature]]
    position_axes: int = 1
    extra: dict[str, tuple[str | int, ...]] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    towers: tuple[str, ...] = ()


def recipe_of(model_type: str) -> Recipe:
    """The recipe of a stock model type; EmitError names those that there are."""
    try:
        return RECIPES[model_type]
    except KeyError:
        raise EmitError(
            f"model type {model_type!r} has no ONNX recipe. Supported: {', '.join(sorted(RECIPES))}. "
            "Export it with --format safetensors, or add a recipe in sasa_export/writers/onnx/recipes.py."
        ) from None


def check_tower(model_type: str, tower: str) -> None:
    """EmitError where the recipe of a stock model type is not for this type of vision tower."""
    towers = recipe_of(model_type).towers
    if towers and tower not in towers:
        raise EmitError(
            f"the ONNX recipe of model type {model_type!r} is for a vision tower of type {' or '.join(towers)}, and "
            f"this model has one of type {tower}. Export it with --format safetensors."
        )


def _square_pictures(model: Any) -> tuple[tuple[torch.Tensor, ...], Signature]:
    """Pictures of the one size that the tower takes."""
    config = model.config.vision_config
    hidden = model.config.get_text_config(decoder=True).hidden_size
    size = config.image_size
    shape = (getattr(config, "num_channels", 3), *(size if isinstance(size, list | tuple) else (size, size)))
    signature = Signature({"pixel_values": ("num_images", *shape)}, {"image_features": ("num_image_tokens", hidden)})
    return (torch.ones(2, *shape),), signature


def _tiles(model: Any) -> tuple[tuple[torch.Tensor, ...], Signature]:
    """LLaVA-NeXT: each picture a whole tile and a grid of tiles, with the picture's size."""
    config, hidden = model.config.vision_config, model.config.text_config.hidden_size
    side = config.image_size
    count = 1 + max(height * width for height, width in model.config.image_grid_pinpoints) // side**2
    shape = (config.num_channels, side, side)
    signature = Signature(
        {"pixel_values": ("num_images", "num_tiles", *shape), "image_sizes": ("num_images", 2)},
        {"image_features": ("num_image_tokens", hidden)},
    )
    sizes = torch.tensor([[side, 2 * side], [2 * side, side]])
    return (torch.ones(2, count, *shape), sizes), signature


def _masked_tiles(model: Any) -> tuple[tuple[torch.Tensor, ...], Signature]:
    """Idefics3 and SmolVLM: tiles with a mask of their pixels."""
    config, hidden = model.config.vision_config, model.config.text_config.hidden_size
    side = config.image_size
    signature = Signature(
        {
            "pixel_values": ("batch_size", "num_images", config.num_channels, side, side),
            "pixel_attention_mask": ("batch_size", "num_images", side, side),
        },
        {"image_features": ("num_image_tokens", hidden)},
    )
    mask = torch.ones(2, 3, side, side, dtype=torch.bool)
    return (torch.ones(2, 3, config.num_channels, side, side), mask), signature


def _any_size(model: Any) -> tuple[tuple[torch.Tensor, ...], Signature]:
    """Mistral 3: pictures of any size, padded to the largest one, and the sizes, without which none is padded."""
    config, hidden = model.config.vision_config, model.config.text_config.hidden_size
    cell = config.patch_size * model.config.spatial_merge_size
    signature = Signature(
        {"pixel_values": ("num_images", config.num_channels, "height", "width"), "image_sizes": ("num_images", 2)},
        {"image_features": ("num_image_tokens", hidden)},
    )
    sizes = torch.tensor([[2 * cell, 3 * cell], [3 * cell, 5 * cell]])
    return (torch.ones(2, config.num_channels, 3 * cell, 5 * cell), sizes), signature


def _patches(model: Any, grid: str = "image_grid_thw") -> tuple[tuple[torch.Tensor, ...], Signature]:
    """Qwen: the patches of all pictures in a row, and each picture's grid."""
    config = model.config.vision_config
    pixels = config.in_channels * config.temporal_patch_size * config.patch_size**2
    width = model.config.text_config.hidden_size * (1 + deep_features(model))
    signature = Signature(
        {"pixel_values": ("num_patches", pixels), grid: ("num_images", 3)},
        {"image_features": ("num_image_tokens", width)},
    )
    grids = torch.tensor([[1, 8, 4], [1, 4, 12]])
    return (torch.ones(8 * 4 + 4 * 12, pixels), grids), signature


def _padded_patches(model: Any) -> tuple[tuple[torch.Tensor, ...], Signature]:
    """LFM2-VL: the patches of each picture, padded to equally many, and its grid."""
    config, hidden = model.config.vision_config, model.config.text_config.hidden_size
    pixels, factor = config.num_channels * config.patch_size**2, model.config.downsample_factor
    signature = Signature(
        {
            "pixel_values": ("num_images", "num_patches", pixels), "spatial_shapes": ("num_images", 2),
            "pixel_attention_mask": ("num_images", "num_patches"),
        },
        {"image_features": ("num_image_tokens", hidden)},
    )  # fmt: skip
    grids = factor * torch.tensor([[2, 3], [4, 2]])
    mask = (torch.arange(9 * factor**2) < grids.prod(-1, keepdim=True)).long()  # (2, patches)
    return (torch.ones(*mask.shape, pixels), grids, mask), signature


RECIPES: dict[str, Recipe] = {
    "llava": Recipe(vision.Llava, _square_pictures, towers=("clip_vision_model", "siglip_vision_model")),
    "llava_next": Recipe(LlavaNext, _tiles, towers=("clip_vision_model",)),
    "smolvlm": Recipe(vision.Idefics3, _masked_tiles),
    "idefics3": Recipe(vision.Idefics3, _masked_tiles),
    # Which tokens are a picture's: they see each other both ways. A runtime that does not say gets a causal mask.
    "gemma3": Recipe(vision.Gemma3, _square_pictures, extra={"token_type_ids": ("batch_size", "sequence_length")}),
    "internvl": Recipe(vision.InternVL, _square_pictures),
    "mistral3": Recipe(Mistral3, _any_size, optional=("image_sizes",), towers=("pixtral",)),
    # The input's name is what transformers.js feeds.
    "qwen2_vl": Recipe(Qwen, partial(_patches, grid="grid_thw"), position_axes=3),
    "qwen2_5_vl": Recipe(Qwen, _patches, position_axes=3),
    "qwen3_vl": Recipe(Qwen, _patches, position_axes=3),
    "lfm2_vl": Recipe(Lfm2, _padded_patches, towers=("siglip2_vision_model",)),
}
