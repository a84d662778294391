"""A torch decoder as a function of plain tensors, as ONNX needs it: the model's own forward on a cache of tensors."""

import contextlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionLayer

from sasa_export.models.family import family_of

# The tensors of one cache layer: keys and values, (batch, key-value heads, tokens, head size). For a block with a short
# convolution: the last inputs of the convolution, (batch, hidden, kernel).
Held = tuple[Tensor, ...]
Shape = tuple[str | int, ...]
Inputs = tuple[dict[str, Shape], tuple[Tensor, ...]]  # of a vision graph: dimensions by name, example arguments
SIZES = {  # sizes for tracing; the dimensions of one tensor all differ
    "batch_size": 2, "sequence_length": 5, "past_sequence_length": 7, "total_sequence_length": 12, "kept_length": 3,
    "num_image_tokens": 3,
}  # fmt: skip


@dataclass(frozen=True)
class Signature:
    """The names of a graph's inputs and outputs, in order, with their dimensions: sizes, or symbols."""

    inputs: dict[str, Shape]
    outputs: dict[str, Shape]

    def example(self, types: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        """Return inputs for tracing, all ones. `types` holds types by the part of a name before a dot; else int64."""
        return {
            name: torch.ones(
                [SIZES[size] if isinstance(size, str) else size for size in shape],
                dtype=types.get(name.partition(".")[0], torch.int64),
            )
            for name, shape in self.inputs.items()
        }


class FlatDecoder(nn.Module):
    """inputs_embeds, attention_mask, position_ids, cache -> logits, cache, for a ...ForConditionalGeneration."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        text = model.config.get_text_config(decoder=True)
        taken = inspect.signature(model.forward).parameters
        self.cache = "cache" if "cache" in taken else "past_key_values"  # named `cache` since transformers 5.24
        self.layers = text.num_hidden_layers
        kinds = getattr(text, "layer_types", None) or ()  # of the blocks, where they differ
        self.convolved = {layer for layer, kind in enumerate(kinds) if kind == "conv"}
        self.widths = [text.hidden_size] * (1 + deep_features(model))
        family = family_of(model.config.model_type)
        self.deep = list(model.get_submodule(family.modules["blocks"]))[: deep_features(model)]

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Held],
        extra: dict[str, Tensor],
    ) -> tuple[Any, ...]:  # fmt: skip
        """Return the logits of the last column, (batch, 1, vocabulary), and the cache after the call.

        Args:
            inputs_embeds: (batch, tokens, hidden), float32 like the logits; the cache has the model's own type. With
                picture features for the first blocks, these follow the embedding: (batch, tokens, n * hidden).
            attention_mask: (batch, past + tokens), int64.
            position_ids: (batch, tokens), or (3, batch, tokens) where a family has three axes.
            past: the tensors of each cache layer.
            extra: further int64 tensors (batch, tokens) for the family's forward.
        """
        # An input that a runtime leaves out is one zero, (1, 1). The product gives it the shape (batch, tokens).
        extra = {name: value * attention_mask[:, -inputs_embeds.shape[1] :] for name, value in extra.items()}
        cache = DynamicCache()
        cache.layers.extend(_filled(*held) for held in past)
        embeds, *added = inputs_embeds.to(past[0][0].dtype).split(self.widths, dim=-1)  # (batch, tokens, hidden) each
        with contextlib.ExitStack() as stack:
            for block, more in zip(self.deep, added, strict=True):
                add = lambda module, given, output, more=more: output + more  # noqa: E731
                stack.enter_context(block.register_forward_hook(add))
            output = self.model(
                inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids,
                use_cache=True, logits_to_keep=1, return_dict=True, **{self.cache: cache}, **extra,
            )  # fmt: skip
        return output.logits.float(), [_held(layer) for layer in cache.layers]

    def signature(self, position_axes: int, extra: tuple[str, ...] = ()) -> Signature:
        """Return names and dimensions as runtimes expect them."""
        text = self.model.config.get_text_config(decoder=True)
        tokens: Shape = ("batch_size", "sequence_length")
        inputs: dict[str, Shape] = {
            "inputs_embeds": (*tokens, sum(self.widths)),
            "attention_mask": ("batch_size", "total_sequence_length"),
            "position_ids": tokens if position_axes == 1 else (position_axes, *tokens),
        }
        outputs: dict[str, Shape] = {"logits": ("batch_size", 1, text.vocab_size)}
        for layer in range(self.layers):
            inputs |= self.held(layer, "past")
            outputs |= self.held(layer, "present")
        return Signature(inputs | dict.fromkeys(extra, tokens), outputs)

    def held(self, layer: int, when: Literal["past", "present"]) -> dict[str, Shape]:
        """Return names and dimensions of the tensors of a cache layer before a call, or after it."""
        text = self.model.config.get_text_config(decoder=True)
        if layer in self.convolved:
            return {f"{when}_conv.{layer}": ("batch_size", text.hidden_size, text.conv_L_cache)}
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        prefix, tokens = {
            "past": ("past_key_values", "past_sequence_length"), "present": ("present", "total_sequence_length")
        }[when]  # fmt: skip
        shape: Shape = ("batch_size", text.num_key_value_heads, tokens, size)
        return {f"{prefix}.{layer}.{kind}": shape for kind in ("key", "value")}

    def example(self, signature: Signature) -> tuple[Any, ...]:
        """Return arguments for tracing: one call with a past."""
        kept = dict.fromkeys(("past_key_values", "past_conv"), self.model.dtype)
        made = signature.example({"inputs_embeds": torch.float32, **kept})
        first = [made.pop(name) for name in ("inputs_embeds", "attention_mask", "position_ids")]
        past = [tuple(made.pop(name) for name in self.held(layer, "past")) for layer in range(self.layers)]
        return *first, past, made


def deep_features(model: Any) -> int:
    """Return the number of first blocks after which a model adds picture features (Qwen3-VL's deepstack)."""
    return len(getattr(model.config.vision_config, "deepstack_visual_indexes", None) or ())


def feature_width(model: Any) -> int:
    """Return the width of a picture's features per token: the embedding, then the features added after blocks."""
    return int(model.config.get_text_config(decoder=True).hidden_size * (1 + deep_features(model)))


def _filled(*held: Tensor) -> DynamicLayer | LinearAttentionLayer:
    """Return a cache layer that holds these tensors."""
    if len(held) == 1:
        (state,) = held
        layer = LinearAttentionLayer()
        layer.conv_states[0], layer.conv_kernel_size[0] = state, state.shape[-1]
        layer.is_conv_states_initialized[0] = layer.has_previous_state[0] = True
        # With recording on, one token takes the same path as several, and the given state is not overwritten.
        layer.activate_past_recording()
    else:
        layer = DynamicLayer()
        layer.keys, layer.values = held
        layer.is_initialized = True
    layer.dtype, layer.device = held[0].dtype, held[0].device
    return layer


def _held(layer: DynamicLayer | LinearAttentionLayer) -> Held:
    """Return the tensors that a cache layer holds after a call."""
    if isinstance(layer, DynamicLayer):
        return layer.keys, layer.values
    return (layer.conv_states[0][..., -layer.conv_kernel_size[0] :],)  # (batch, hidden, kernel)
