"""The decoder as one flat function of tensors, which is what ONNX can hold: the model's own forward on a flat cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from sasa_export.models.family import family_of
from sasa_export.writers.onnx.layout import stock_type

Pair = tuple[torch.Tensor, torch.Tensor]  # keys and values, (batch, key-value heads, tokens, head size)
Shape = tuple[str | int, ...]


@dataclass(frozen=True)
class Signature:
    """Names of a graph's inputs and outputs in order, and the symbols of their dimensions."""

    inputs: dict[str, Shape]
    outputs: dict[str, Shape]


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
        self.layers = text.num_hidden_layers + gate_layers(model)
        self.widths = [text.hidden_size] * (1 + deep_features(model))
        family = family_of(stock_type(model.config.model_type))
        self.deep = list(model.get_submodule(family.modules["blocks"]))[: deep_features(model)]

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[Pair],
        extra: dict[str, torch.Tensor],
    ) -> tuple[Any, ...]:
        """Logits of the last column, (batch, 1, vocabulary), and the cache after the call.

        Args:
            inputs_embeds: (batch, tokens, hidden), float32 as the logits; the cache has the model's own type. Where a
                picture adds something behind the first blocks too, that comes after it: (batch, tokens, n * hidden).
            attention_mask: (batch, past + tokens), int64.
            position_ids: (batch, tokens), or (3, batch, tokens) where a family has three axes.
            past: keys and values of each layer, those of the gate's ledger behind those of the decoder's blocks.
            extra: further tensors (batch, tokens), int64, that the family's forward takes.
        """
        # An input that a runtime leaves out is one zero, (1, 1); the product makes it as wide as the others.
        extra = {name: value * attention_mask[:, -inputs_embeds.shape[1] :] for name, value in extra.items()}
        cache = DynamicCache()
        cache.layers.extend(_filled(keys, values) for keys, values in past)
        embeds, *added = inputs_embeds.to(past[0][0].dtype).split(self.widths, dim=-1)  # (batch, tokens, hidden) each
        with adding(self.deep, added):
            output = self.model(
                inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=cache, use_cache=True, logits_to_keep=1, return_dict=True, **extra,
            )  # fmt: skip
        present = [(layer.keys, layer.values) for layer in cache.layers]
        judged = (output.unsafe_probability, output.is_due) if self.guarded else ()
        return output.logits.float(), present, *judged

    def signature(self, position_axes: int, extra: dict[str, Shape]) -> Signature:
        """Names and dimensions as runtimes expect them."""
        text = self.model.config.get_text_config(decoder=True)
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        tokens: Shape = ("batch_size", "sequence_length")
        inputs: dict[str, Shape] = {
            "inputs_embeds": (*tokens, sum(self.widths)),
            "attention_mask": ("batch_size", "total_sequence_length"),
            "position_ids": tokens if position_axes == 1 else (position_axes, *tokens),
        }
        outputs: dict[str, Shape] = {"logits": ("batch_size", 1, text.vocab_size)}
        for name in (f"{layer}.{kind}" for layer in range(self.layers) for kind in ("key", "value")):
            heads = text.num_key_value_heads
            inputs[f"past_key_values.{name}"] = ("batch_size", heads, "past_sequence_length", size)
            outputs[f"present.{name}"] = ("batch_size", heads, "total_sequence_length", size)
        if self.guarded:
            outputs |= {"unsafe_probability": ("batch_size",), "is_due": ()}
        return Signature(inputs | extra, outputs)

    def example(self, signature: Signature) -> tuple[Any, ...]:
        """Arguments to trace with: one call on top of a past, no two dimensions alike."""
        sizes = {"batch_size": 2, "sequence_length": 5, "past_sequence_length": 7, "total_sequence_length": 12}
        made = {
            name: torch.ones([sizes[size] if isinstance(size, str) else size for size in shape])
            for name, shape in signature.inputs.items()
        }
        embeds = made.pop("inputs_embeds")
        mask, positions = (made.pop(name).long() for name in ("attention_mask", "position_ids"))
        past = [
            tuple(made.pop(f"past_key_values.{layer}.{kind}").to(self.model.dtype) for kind in ("key", "value"))
            for layer in range(self.layers)
        ]
        return embeds, mask, positions, past, {name: value.long() for name, value in made.items()}


def deep_features(model: Any) -> int:
    """Behind how many of its first blocks a model adds something of a picture (Qwen3-VL's deepstack)."""
    return len(getattr(model.config.vision_config, "deepstack_visual_indexes", None) or ())


@contextlib.contextmanager
def adding(blocks: Sequence[nn.Module], added: Sequence[torch.Tensor]) -> Iterator[None]:
    """A context in which each block's output is what it computes and one of the tensors (batch, tokens, hidden)."""
    with contextlib.ExitStack() as stack:
        for block, more in zip(blocks, added, strict=True):
            handle = block.register_forward_hook(lambda module, given, output, more=more: output + more)
            stack.callback(handle.remove)
        yield


def gate_layers(model: Any) -> int:
    """How many cache layers a model has behind those of its blocks: those of the gate's ledger."""
    return int(model.sasa.ledger.layers) if hasattr(model, "sasa") else 0


def _filled(keys: torch.Tensor, values: torch.Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    layer.dtype, layer.device = keys.dtype, keys.device
    layer.keys, layer.values, layer.is_initialized = keys, values, True
    return layer
