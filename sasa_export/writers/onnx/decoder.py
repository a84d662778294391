"""The decoder as one flat function of tensors, which is what ONNX can hold: the model's own forward on a flat cache."""

import contextlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionLayer

from sasa_export.models.family import family_of
from sasa_export.writers.onnx.guard import for_export
from sasa_export.writers.onnx.layout import stock_type

# What one layer of the cache holds: keys and values, (batch, key-value heads, tokens, head size), or, of a block with a
# short convolution, what that saw last, (batch, hidden, kernel).
Held = tuple[torch.Tensor, ...]
Shape = tuple[str | int, ...]
SIZES = {  # of what is traced: no two dimensions of a tensor are alike
    "batch_size": 2, "sequence_length": 5, "past_sequence_length": 7, "total_sequence_length": 12, "kept_length": 3,
    "num_image_tokens": 3,
}  # fmt: skip


@dataclass(frozen=True)
class Signature:
    """Names of a graph's inputs and outputs in order, and the symbols of their dimensions."""

    inputs: dict[str, Shape]
    outputs: dict[str, Shape]

    def example(self, types: Mapping[str, torch.dtype]) -> dict[str, torch.Tensor]:
        """Inputs to trace with, all ones: int64 but for those that `types` names, by what stands before a dot."""
        return {
            name: torch.ones(
                [SIZES[size] if isinstance(size, str) else size for size in shape],
                dtype=types.get(name.partition(".")[0], torch.int64),
            )
            for name, shape in self.inputs.items()
        }


class Decoder(nn.Module):
    """inputs_embeds, attention_mask, position_ids, cache -> logits, cache; guarded, also P(unsafe), and if it is due.

    Args:
        model: a guarded ...ForConditionalGeneration, or a stock one: the plain export to compare with.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        text = model.config.get_text_config(decoder=True)
        self.guarded = hasattr(model, "sasa")
        if self.guarded:
            for_export(model)
        taken = inspect.signature(model.forward).parameters
        self.cache = "cache" if "cache" in taken else "past_key_values"  # its name since transformers 5.24, and before
        self.gate = int(model.sasa.ledger.layers) if self.guarded else 0  # layers of the cache, behind the blocks'
        self.layers = text.num_hidden_layers + self.gate
        self.kinds = tuple(getattr(text, "layer_types", None) or ())  # of the blocks, where they are of several
        self.convolved = {layer for layer, kind in enumerate(self.kinds) if kind == "conv"}
        self.widths = [text.hidden_size] * (1 + deep_features(model))
        family = family_of(stock_type(model.config.model_type))
        self.deep = list(model.get_submodule(family.modules["blocks"]))[: deep_features(model)]

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[Held],
        extra: dict[str, torch.Tensor],
    ) -> tuple[Any, ...]:
        """Logits of the last column, (batch, 1, vocabulary), and the cache after the call.

        Args:
            inputs_embeds: (batch, tokens, hidden), float32 as the logits; the cache has the model's own type. Where a
                picture adds something behind the first blocks too, that comes after it: (batch, tokens, n * hidden).
            attention_mask: (batch, past + tokens), int64.
            position_ids: (batch, tokens), or (3, batch, tokens) where a family has three axes.
            past: of each layer, those of the gate's ledger behind those of the decoder's blocks.
            extra: further tensors (batch, tokens), int64, that the family's forward takes.
        """
        # An input that a runtime leaves out is one zero, (1, 1); the product makes it as wide as the others.
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
        present = [_held(layer) for layer in cache.layers]
        judged = (output.unsafe_probability, output.is_due) if self.guarded else ()
        return output.logits.float(), present, *judged

    def signature(self, position_axes: int, extra: dict[str, Shape]) -> Signature:
        """Names and dimensions as runtimes expect them."""
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
        if self.guarded:
            outputs |= {"unsafe_probability": ("batch_size",), "is_due": ()}
        return Signature(inputs | extra, outputs)

    def held(self, layer: int, when: Literal["past", "present"]) -> dict[str, Shape]:
        """Names and dimensions of what a layer of the cache holds before a call, or after it."""
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
        """Arguments to trace with: one call on top of a past."""
        kept = dict.fromkeys(("past_key_values", "past_conv"), self.model.dtype)
        made = signature.example({"inputs_embeds": torch.float32, **kept})
        first = [made.pop(name) for name in ("inputs_embeds", "attention_mask", "position_ids")]
        past = [tuple(made.pop(name) for name in self.held(layer, "past")) for layer in range(self.layers)]
        return *first, past, made


def deep_features(model: Any) -> int:
    """Behind how many of its first blocks a model adds something of a picture (Qwen3-VL's deepstack)."""
    return len(getattr(model.config.vision_config, "deepstack_visual_indexes", None) or ())


def feature_width(model: Any) -> int:
    """What a picture gives for each of its tokens: what enters the decoder first, then what is added behind blocks."""
    return int(model.config.get_text_config(decoder=True).hidden_size * (1 + deep_features(model)))


def _filled(*held: torch.Tensor) -> DynamicLayer | LinearAttentionLayer:
    """A layer of the cache that holds this already."""
    if len(held) == 1:
        (state,) = held
        layer = LinearAttentionLayer()
        layer.conv_states[0], layer.conv_kernel_size[0] = state, state.shape[-1]
        layer.is_conv_states_initialized[0] = layer.has_previous_state[0] = True
        # Then it takes one token as it takes several, and the state that it was given stays as it is.
        layer.activate_past_recording()
    else:
        layer = DynamicLayer()
        layer.keys, layer.values = held
        layer.is_initialized = True
    layer.dtype, layer.device = held[0].dtype, held[0].device
    return layer


def _held(layer: DynamicLayer | LinearAttentionLayer) -> Held:
    """What a layer of the cache holds after a call."""
    if isinstance(layer, DynamicLayer):
        return layer.keys, layer.values
    return (layer.conv_states[0][..., -layer.conv_kernel_size[0] :],)  # (batch, hidden, kernel)
