"""The guarded decoder as one flat function of tensors, which is what ONNX can hold.

It adds no step of its own: the main lane is the family's stock forward, and projection, lane, probe, gate and
the state in the cache are the functions of the model's own modeling_sasa.py.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

Pair = tuple[torch.Tensor, torch.Tensor]  # keys and values, (batch, key-value heads, tokens, head size)


@dataclass(frozen=True)
class Signature:
    """Names of a graph's inputs and outputs in order, and the symbols of their dimensions."""

    inputs: dict[str, tuple[str | int, ...]]
    outputs: dict[str, tuple[str | int, ...]]


class Decoder(nn.Module):
    """inputs_embeds, attention_mask, position_ids, cache -> logits, cache, P(unsafe), whether this is a prompt.

    What a call is follows from the cache alone:

    - no past: a prompt. Both lanes run, and the verdict is written into the extra layer, the last one.
    - one token on a past: the answer goes on as the last row of the extra layer says.
    - several tokens on a past, or a past without its verdict: nobody judged them, and torch raises an error.
      A graph cannot, so the refusal starts in all rows that are not refused already.

    Args:
        model: the guarded ...ForConditionalGeneration.
        guarded: False leaves out everything of SASA: the plain export to compare with.
    """

    model: Any

    def __init__(self, model: Any, *, guarded: bool = True) -> None:
        super().__init__()
        self.model = model
        self.guarded = guarded
        self.gate, self.last_real = _Named(), _Named()
        # What travels inside the directory is what gets exported, so it is taken from there.
        self.runtime: Any = sys.modules[type(model).__module__]
        stock: Any = type(model).__mro__[2]
        self.stock_forward = stock.forward
        self.layers, self.heads, self.size = self.runtime.cache_shape(model.config.get_text_config(decoder=True))

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[Pair],
        extra: dict[str, torch.Tensor],
    ) -> tuple[Any, ...]:
        """Logits of the last column, (batch, 1, vocabulary); see the class.

        Args:
            inputs_embeds: (batch, tokens, hidden), float32 as the logits; the cache has the model's own type.
            attention_mask: (batch, past + tokens), int64.
            position_ids: (batch, tokens), or (3, batch, tokens) where a family has three axes.
            past: keys and values of each layer; guarded, one layer more than the decoder has blocks.
            extra: further tensors (batch, tokens), int64, that the family's forward takes.
        """
        # An input that a runtime leaves out is one zero, (1, 1); the product makes it as wide as the others.
        extra = {name: value * attention_mask[:, -inputs_embeds.shape[1] :] for name, value in extra.items()}
        inputs_embeds = inputs_embeds.to(past[0][0].dtype)
        cache = DynamicCache()
        cache.layers.extend(_filled(keys, values) for keys, values in past[: self.layers])
        with self.runtime.recording() as seen:
            output = self.stock_forward(
                self.model, inputs_embeds=inputs_embeds, attention_mask=attention_mask,
                position_ids=position_ids, past_key_values=cache, use_cache=True, logits_to_keep=1,
                return_dict=True, **extra,
            )  # fmt: skip
        present = [(layer.keys, layer.values) for layer in cache.layers]
        if not self.guarded:
            return output.logits.float(), present
        settings = self.model.config.sasa
        last = self.last_real(self.runtime.last_real, attention_mask, inputs_embeds.shape[1], inputs_embeds)  # (batch,)
        values = self.runtime.run_graph(self.model, settings["graph"], seen, last)
        probability = next(values[node["name"]] for node in settings["graph"] if node["op"] == "probe")  # (batch,)
        logits, layer, prompt = self.gate(self._gate, output.logits.float(), inputs_embeds, past, probability)
        return logits, [*present, layer], probability, prompt

    def _gate(
        self, logits: torch.Tensor, fed: torch.Tensor, past: list[Pair], probability: torch.Tensor
    ) -> tuple[torch.Tensor, Pair, torch.Tensor]:
        """The gated logits (batch, 1, vocabulary), the extra layer, and whether the call is a prompt, () bool."""
        refused = ~(probability < self.model.config.sasa["threshold"])  # (batch,); NaN is refused
        prompt, state = self._state(fed, past, refused)
        refusal = tuple(self.model.config.sasa["refusal_token_ids"])
        due = torch.tensor(refusal)[(state - 1).clamp_min(0)]  # (batch,)
        logits = self.runtime.gate(logits, due[:, None], state[:, None] > 0, refusal)
        keys, values = past[self.layers]
        rows = self.runtime.state_rows(state, fed.shape[1], self.heads, self.size, keys.dtype)
        return logits, (torch.cat([keys, rows], 2), torch.cat([values, torch.zeros_like(rows)], 2)), prompt

    def _state(self, fed: torch.Tensor, past: list[Pair], refused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether the call is a prompt, () bool, and the state of each row after it, (batch,) int64."""
        keys = past[self.layers][0]  # (batch, heads, past, size)
        # Lengths as tensors: as numbers they would be frozen into the graph.
        length, judged, tokens = (_scalar(size) for size in (past[0][0].shape[2], keys.shape[2], fed.shape[1]))
        start = torch.zeros(keys.shape[0], 1, dtype=keys.dtype)  # no past, no state
        before = torch.cat([start, keys[:, 0, :, 0]], dim=1)[:, -1].round().long()  # (batch,)
        count = len(self.model.config.sasa["refusal_token_ids"])
        follows = self.runtime.next_state(before, count)  # (batch,)
        unjudged = (tokens != 1) | (length != judged)  # ()
        follows = torch.where(unjudged, follows.clamp_min(1), follows)  # (batch,)
        prompt = (length == 0) & (judged == 0)  # ()
        return prompt, torch.where(prompt, refused.long(), follows)

    def signature(self, position_axes: int, extra: dict[str, tuple[str | int, ...]]) -> Signature:
        """Names and dimensions as runtimes expect them."""
        text = self.model.config.get_text_config(decoder=True)
        positions = ("batch_size", "sequence_length")
        inputs: dict[str, tuple[str | int, ...]] = {
            "inputs_embeds": ("batch_size", "sequence_length", text.hidden_size),
            "attention_mask": ("batch_size", "total_sequence_length"),
            "position_ids": positions if position_axes == 1 else (position_axes, *positions),
        }
        outputs: dict[str, tuple[str | int, ...]] = {"logits": ("batch_size", 1, text.vocab_size)}
        for layer in range(self.layers + self.guarded):
            for kind in ("key", "value"):
                inputs[f"past_key_values.{layer}.{kind}"] = (
                    "batch_size", self.heads, "past_sequence_length", self.size,
                )  # fmt: skip
                outputs[f"present.{layer}.{kind}"] = (
                    "batch_size", self.heads, "total_sequence_length", self.size,
                )  # fmt: skip
        if self.guarded:
            outputs |= {"unsafe_probability": ("batch_size",), "is_prompt": ()}
        return Signature(inputs | extra, outputs)

    def example(self, signature: Signature, dtype: torch.dtype) -> tuple[Any, ...]:
        """Arguments to trace with: one call on top of a past, no two dimensions alike."""
        sizes = {"batch_size": 2, "sequence_length": 5, "past_sequence_length": 3, "total_sequence_length": 8}

        def make(name: str, kind: torch.dtype) -> torch.Tensor:
            shape = [sizes[size] if isinstance(size, str) else size for size in signature.inputs[name]]
            return torch.ones(shape, dtype=kind)

        past = [
            (make(f"past_key_values.{layer}.key", dtype), make(f"past_key_values.{layer}.value", dtype))
            for layer in range(self.layers + self.guarded)
        ]
        standard = ("inputs_embeds", "attention_mask", "position_ids")
        extra = {
            name: make(name, torch.int64)
            for name in signature.inputs
            if name not in standard and not name.startswith("past_key_values.")
        }
        return (
            make("inputs_embeds", torch.float32), make("attention_mask", torch.int64),
            make("position_ids", torch.int64), past, extra,
        )  # fmt: skip


class _Named(nn.Module):
    """Lends its name to what is traced within it, so that the nodes can be told apart."""

    def forward(self, function: Any, *arguments: Any) -> Any:
        return function(*arguments)


def _filled(keys: torch.Tensor, values: torch.Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    layer.dtype, layer.device = keys.dtype, keys.device
    layer.keys, layer.values, layer.is_initialized = keys, values, True
    return layer


def _scalar(size: Any) -> torch.Tensor:
    return torch.full((), size, dtype=torch.int64)
