"""The modules of the two graphs before the decoder: one for picture features, one for token embeddings."""

from typing import Any

import torch
from torch import nn

from sasa_export.onnx.flat import Inputs, Shape, feature_width


class Float32(nn.Module):
    """Gives a module float32 inputs and outputs, whatever type it computes in. Runtimes feed all types alike."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype, *, flat: bool = False) -> None:
        super().__init__()
        self.inner, self.dtype, self.flat = inner, dtype, flat  # flat: (tokens of all pictures in a row, width)

    def forward(self, arguments: list[torch.Tensor]) -> torch.Tensor:
        cast = (value.to(self.dtype) if value.is_floating_point() else value for value in arguments)
        found = self.inner(*cast).float()
        return found.flatten(0, -2) if self.flat else found


class Embedding(nn.Module):
    """input_ids (batch, tokens) -> inputs_embeds (batch, tokens, width), as wide as the features of a picture.

    Picture features (tokens of pictures, width), if given, replace the embeddings of the pictures' tokens.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.embed_tokens = model.get_input_embeddings()
        self.added = feature_width(model) - self.embed_tokens.weight.shape[1]
        self.picture: Any = getattr(model.config, "image_token_id", None)

    def forward(self, input_ids: torch.Tensor, image_features: torch.Tensor | None = None) -> torch.Tensor:
        embeds = self.embed_tokens(input_ids)  # (batch, tokens, hidden)
        embeds = nn.functional.pad(embeds, (0, self.added)) if self.added else embeds  # (batch, tokens, width)
        if image_features is None:
            return embeds
        pictured = input_ids == self.picture  # (batch, tokens)
        number = (pictured.flatten().cumsum(0) - 1).reshape(pictured.shape)  # (batch, tokens), among the features
        count = image_features.shape[0]
        # The extra row is looked up where the call has no picture.
        rows = nn.functional.pad(image_features, (0, 0, 0, 1))  # (tokens of pictures + 1, width)
        given = (pictured & (number < count))[..., None]  # (batch, tokens, 1)
        return torch.where(given, rows[number.clamp(0, count)].to(embeds.dtype), embeds)


def square_pictures(model: Any) -> Inputs:
    """Return the inputs of a tower for pictures of one size."""
    config = model.config.vision_config
    size = config.image_size
    shape = (getattr(config, "num_channels", 3), *(size if isinstance(size, list | tuple) else (size, size)))
    return {"pixel_values": ("num_images", *shape)}, (torch.ones(2, *shape),)


class Llava(nn.Module):
    """pixel_values (images, channels, height, width) -> image_features (images, tokens, hidden)."""

    inputs = staticmethod(square_pictures)

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision_tower = model.model.vision_tower
        self.multi_modal_projector = model.model.multi_modal_projector
        layers = model.config.vision_feature_layer
        self.layers = [layers] if isinstance(layers, int) else list(layers)
        self.drops_class_token = model.config.vision_feature_select_strategy == "default"

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        states = self.vision_tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        chosen = torch.cat([states[layer] for layer in self.layers], dim=-1)  # (images, 1 + patches, hidden)
        if self.drops_class_token:
            chosen = chosen[:, 1:]  # (images, patches, hidden)
        return self.multi_modal_projector(chosen)


class Stock(nn.Module):
    """pixel_values (pictures or tiles, channels, height, width) -> image_features (pictures or tiles, tokens, hidden),
    by the stock model's own method."""

    inputs = staticmethod(square_pictures)

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model.model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.inner.get_image_features(pixel_values, return_dict=True).pooler_output


class Idefics3(nn.Module):
    """Pictures cut into tiles -> image_features (real tiles, tokens, hidden).

    The stock model drops tiles of pure padding before its tower. This module drops them after the tower, so that no
    shape inside depends on pixels.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision_model = model.model.vision_model
        self.connector = model.model.connector
        self.patch = model.config.vision_config.patch_size

    @staticmethod
    def inputs(model: Any) -> Inputs:
        config = model.config.vision_config
        side = config.image_size
        named: dict[str, Shape] = {
            "pixel_values": ("batch_size", "num_images", config.num_channels, side, side),
            "pixel_attention_mask": ("batch_size", "num_images", side, side),
        }
        mask = torch.ones(2, 3, side, side, dtype=torch.bool)
        return named, (torch.ones(2, 3, config.num_channels, side, side), mask)

    def forward(self, pixel_values: torch.Tensor, pixel_attention_mask: torch.Tensor) -> torch.Tensor:
        """pixel_values (batch, tiles, channels, height, width), pixel_attention_mask (batch, tiles, height, width)."""
        pixels = pixel_values.flatten(0, 1)  # (batch * tiles, channels, height, width)
        real = (pixels != 0).flatten(1).any(-1)  # (batch * tiles,)
        real = real | (~real.any() & (torch.arange(real.shape[0]) == 0))  # keep at least one, like the stock model
        mask = pixel_attention_mask.flatten(0, 1) != 0  # (batch * tiles, height, width)
        rows = mask.unflatten(1, (-1, self.patch)).any(2)  # (batch * tiles, patch rows, width)
        patches = rows.unflatten(2, (-1, self.patch)).any(3)  # (batch * tiles, patch rows, patch columns)
        patches = patches | ~real[:, None, None]  # padding would have nothing to attend to
        output = self.vision_model(pixel_values=pixels, patch_attention_mask=patches, return_dict=True)
        return self.connector(output.last_hidden_state)[real]
