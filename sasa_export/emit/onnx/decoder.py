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
    """inputs_embeds, attention_mask, position_ids, cache -> logits, cache, P(unsafe), whether a verdict is due.

    Every call reads the whole context's ledger out of the extra cache layers and writes the fed tokens' into them;
    a verdict is due where the call completes a prompt. A past without its ledger was judged by nobody, and torch
    raises an error there. A graph cannot, so the refusal starts in all rows that are not refused already.

    Args:
        model: the guarded ...ForConditionalGeneration.
        guarded: False leaves out everything of SASA: the plain export to compare with.
    """

    model: Any
    known: torch.Tensor

    def __init__(self, model: Any, *, guarded: bool = True) -> None:
        super().__init__()
        self.model = model
        self.guarded = guarded
        self.projection, self.ledger, self.turn, self.gate = _Named(), _Named(), _Named(), _Named()
        # What travels inside the directory is what gets exported, so it is taken from there.
        self.runtime: Any = sys.modules[type(model).__module__]
        stock: Any = type(model).__mro__[2]
        self.stock_forward = stock.forward
        text = model.config.get_text_config(decoder=True)
        sasa = model.config.sasa
        self.shape, self.words = self.runtime.Ledger.of(text, sasa), self.runtime.Words.of(sasa)
        self.layers = self.shape.first
        with torch.no_grad():
            known = model.get_input_embeddings()(torch.tensor(self.words.table, device=model.device))
        self.register_buffer("known", known.float(), persistent=False)  # (symbols, hidden)

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
            past: keys and values of each layer; guarded, the ledger's layers follow those of the decoder's blocks.
            extra: further tensors (batch, tokens), int64, that the family's forward takes.
        """
        # An input that a runtime leaves out is one zero, (1, 1); the product makes it as wide as the others.
        extra = {name: value * attention_mask[:, -inputs_embeds.shape[1] :] for name, value in extra.items()}
        fed = inputs_embeds
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
        graph = self.model.config.sasa["graph"]
        kept = [tensor for pair in past[self.layers :] for tensor in pair]  # (batch, heads, past, size) each
        projection = self.projection(self.runtime.project_taps, graph, seen)  # (batch, tokens, hidden)
        masks = {"attention_mask": attention_mask, **extra}
        columns, context, turn, unjudged = self.turn(self._turn, fed, masks, seen.position_ids, past, kept)

        # What only the verdict needs, from here to the probe, goes into a branch later on.
        whole = torch.cat([self.shape.unpack_projection(kept), projection.to(kept[0].dtype)], dim=1)
        real = context[..., self.runtime.REAL] > 0  # (batch, context)
        arguments = self.runtime.context_arguments(self.model.model, whole, real, context, self.shape)
        values = self.runtime.run_lane(self.model, graph, whole, arguments, turn.judged)
        probability = next(values[node["name"]] for node in graph if node["op"] == "probe")  # (batch,)
        probability = probability.masked_fill(~turn.due, float("nan"))
        refused = ~(probability < self.model.config.sasa["threshold"])  # (batch,); NaN is refused
        judged = turn.refused_states * refused[:, None]  # (batch, tokens)

        states = self.turn(self._states, turn, judged, unjudged)  # (batch, tokens)
        logits = self.gate(self._gate, output.logits.float(), states[:, -1:])
        ledger = self.ledger(self._ledger, columns, states, turn.covered, projection, kept)
        return logits, [*present, *ledger], probability, judged, turn.due.any()

    def _turn(
        self,
        fed: torch.Tensor,
        masks: dict[str, torch.Tensor],
        position_ids: torch.Tensor,
        past: list[Pair],
        kept: list[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, Any, torch.Tensor]:
        """The fed tokens' columns, those of the context, what the call brings, and whether the past has no ledger."""
        symbols = self.words.in_embeddings(fed, self.known)  # (batch, tokens)
        judged = kept[0].shape[2]
        columns = self.runtime.read_columns(masks, judged, fed, symbols, position_ids, self.shape)
        earlier = self.shape.unpack_columns(kept)  # (batch, past, columns)
        start = torch.zeros_like(columns[:, :1, self.runtime.STATE])  # (batch, 1): no past, no state
        before = torch.cat([start, earlier[..., self.runtime.STATE]], dim=1)[:, -1]  # (batch,)
        context = torch.cat([earlier, columns], dim=1)  # (batch, context, columns)
        # Lengths as tensors: as numbers they would be frozen into the graph.
        length, known, tokens = (_scalar(size) for size in (past[0][0].shape[2], judged, fed.shape[1]))
        symbols, real, covered = (
            context[..., self.runtime.SYMBOL],
            context[..., self.runtime.REAL] > 0,
            context[..., self.runtime.JUDGED] > 0,
        )  # (batch, context)
        several = (tokens != 1) | (known == 0)  # ()
        turn = self.runtime.read_turn(symbols, real, judged, several, before, covered, self.words)
        return columns, context, turn, length != known

    def _states(self, turn: Any, judged: torch.Tensor, unjudged: torch.Tensor) -> torch.Tensor:
        """STATE of the fed tokens (batch, tokens), given what it is where a verdict is due."""
        states = torch.where(turn.due[:, None], judged, turn.other_states)
        return torch.where(unjudged, states.clamp_min(1), states)

    def _gate(self, logits: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """The gated logits (batch, 1, vocabulary), given STATE (batch, 1)."""
        refusal = tuple(self.model.config.sasa["refusal_token_ids"])
        due = torch.tensor(refusal)[(states - 1).clamp_min(0)]  # (batch, 1)
        gated: torch.Tensor = self.runtime.gate(logits, due, states > 0, refusal)
        return gated

    def _ledger(
        self,
        columns: torch.Tensor,
        states: torch.Tensor,
        covered: torch.Tensor,
        projection: torch.Tensor,
        kept: list[torch.Tensor],
    ) -> list[Pair]:
        """The extra layers with the fed tokens behind."""
        found = {self.runtime.STATE: states, self.runtime.JUDGED: covered.to(columns)}  # (batch, tokens) each
        columns = torch.stack([found.get(index, column) for index, column in enumerate(columns.unbind(-1))], dim=-1)
        rows = self.shape.pack(columns, projection, kept[0].dtype)
        grown = [torch.cat([before, row], dim=2) for before, row in zip(kept, rows, strict=True)]
        return list(zip(grown[::2], grown[1::2], strict=True))

    @property
    def count(self) -> int:
        """How many cache layers the graph has."""
        return self.layers + (self.shape.layers if self.guarded else 0)

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
        for layer in range(self.count):
            for kind in ("key", "value"):
                inputs[f"past_key_values.{layer}.{kind}"] = (
                    "batch_size", self.shape.heads, "past_sequence_length", self.shape.size,
                )  # fmt: skip
                outputs[f"present.{layer}.{kind}"] = (
                    "batch_size", self.shape.heads, "total_sequence_length", self.shape.size,
                )  # fmt: skip
        if self.guarded:
            outputs["unsafe_probability"] = ("batch_size",)
            outputs |= {"sasa.states": ("batch_size", "sequence_length"), "is_due": ()}
        return Signature(inputs | extra, outputs)

    def example(self, signature: Signature, dtype: torch.dtype) -> tuple[Any, ...]:
        """Arguments to trace with: one call on top of a past, no two dimensions alike."""
        sizes = {"batch_size": 2, "sequence_length": 5, "past_sequence_length": 3, "total_sequence_length": 8}

        def make(name: str, kind: torch.dtype) -> torch.Tensor:
            shape = [sizes[size] if isinstance(size, str) else size for size in signature.inputs[name]]
            return torch.ones(shape, dtype=kind)

        past = [
            (make(f"past_key_values.{layer}.key", dtype), make(f"past_key_values.{layer}.value", dtype))
            for layer in range(self.count)
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


def ledger_layers(model: Any) -> int:
    """How many cache layers a guarded model has behind those of its blocks."""
    ledger: Any = sys.modules[type(model).__module__].Ledger
    return int(ledger.of(model.config.get_text_config(decoder=True), model.config.sasa).layers)


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
