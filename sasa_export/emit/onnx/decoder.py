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

    def __init__(self, model: nn.Module, *, guarded: bool = True) -> None:
        super().__init__()
        self.model = model
        self.guarded = guarded
        # What travels inside the directory is what gets exported, so it is taken from there.
        self.runtime: Any = sys.modules[type(model).__module__]
        self.stock_forward = type(model).__mro__[2].forward  # type: ignore[attr-defined]
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
            inputs_embeds: (batch, tokens, hidden).
            attention_mask: (batch, past + tokens), int64.
            position_ids: (batch, tokens), or (3, batch, tokens) where a family has three axes.
            past: keys and values of each layer; guarded, one layer more than the decoder has blocks.
            extra: further tensors that the family's forward takes.
        """
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
            return output.logits, present
        settings = self.model.config.sasa  # type: ignore[union-attr]
        last = self.runtime.last_real(attention_mask, inputs_embeds.shape[1], inputs_embeds)  # (batch,)
        values = self.runtime.run_graph(self.model, settings["graph"], seen, last)
        probability = next(values[node["name"]] for node in settings["graph"] if node["op"] == "probe")  # (batch,)
        prompt, state = self._state(inputs_embeds, past, ~(probability < settings["threshold"]))
        refusal = tuple(settings["refusal_token_ids"])
        due = torch.tensor(refusal)[(state - 1).clamp_min(0)]  # (batch,)
        logits = self.runtime.gate(output.logits, due[:, None], state[:, None] > 0, refusal)  # (batch, 1, vocabulary)
        keys, values_ = past[self.layers]  # the extra layer
        rows = self.runtime.state_rows(state, inputs_embeds.shape[1], self.heads, self.size, keys.dtype)
        present.append((torch.cat([keys, rows], 2), torch.cat([values_, torch.zeros_like(rows)], 2)))
        return logits, present, probability, prompt

    def _state(self, fed: torch.Tensor, past: list[Pair], refused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether the call is a prompt, () bool, and the state of each row after it, (batch,) int64."""
        keys = past[self.layers][0]  # (batch, heads, past, size)
        # Lengths as tensors: as numbers they would be frozen into the graph.
        length, judged, tokens = (_scalar(size) for size in (past[0][0].shape[2], keys.shape[2], fed.shape[1]))
        start = torch.zeros_like(keys[:, 0, :1, 0].sum(-1, keepdim=True))  # (batch, 1): no past, no state
        before = torch.cat([start, keys[:, 0, :, 0]], dim=1)[:, -1].round().long()  # (batch,)
        count = len(self.model.config.sasa["refusal_token_ids"])  # type: ignore[union-attr]
        follows = self.runtime.next_state(before, count)  # (batch,)
        unjudged = (tokens != 1) | (length != judged)  # ()
        follows = torch.where(unjudged, follows.clamp_min(1), follows)  # (batch,)
        prompt = (length == 0) & (judged == 0)  # ()
        return prompt, torch.where(prompt, refused.long(), follows)

    def signature(self, position_axes: int, extra: dict[str, tuple[str | int, ...]]) -> Signature:
        """Names and dimensions as runtimes expect them."""
        text = self.model.config.get_text_config(decoder=True)  # type: ignore[union-attr]
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
            make("inputs_embeds", dtype), make("attention_mask", torch.int64),
            make("position_ids", torch.int64), past, extra,
        )  # fmt: skip


def _filled(keys: torch.Tensor, values: torch.Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    layer.dtype, layer.device = keys.dtype, keys.device
    layer.keys, layer.values, layer.is_initialized = keys, values, True
    return layer


def _scalar(size: int | torch.SymInt) -> torch.Tensor:
    return torch.full((), size, dtype=torch.int64)
