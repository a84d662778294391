"""The guarded decoder as one flat function of tensors, which is what ONNX can hold.

It adds no step of its own: the main lane is the family's stock forward, and projection, lane, probe, gate and
the state in the cache are the functions of the model's own modeling_sasa.py.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

Pair = tuple[torch.Tensor, torch.Tensor]  # keys and values, (batch, key-value heads, tokens, head size)


class Decoder(nn.Module):
    """inputs_embeds, attention_mask, position_ids, cache -> logits, cache, and what the branches are cut along.

    A call that may complete a prompt reads the whole context's ledger out of the extra cache layers, and where it
    does complete one, a verdict is due; every call writes the fed tokens' ledger into them. A past without its
    ledger was judged by nobody, and torch raises an error there. A graph cannot, so the refusal starts in all rows
    that are not refused already.

    Where every token is judged, the second lane runs along in every call instead, on cache layers of its own behind
    the ledger's, and there is nothing to branch on.

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
        self.lane = _Named()
        # What travels inside the directory is what gets exported, so it is taken from there.
        self.runtime: Any = sys.modules[type(model).__module__]
        self.stock_forward = type(model).forward.__wrapped__  # the family's, around which the gate lies
        text = model.config.get_text_config(decoder=True)
        sasa = model.config.sasa
        self.shape, self.words = self.runtime.Ledger.of(text, sasa), self.runtime.Words.of(sasa)
        self.layers = self.shape.first
        self.every_token = sasa["gate"] == self.runtime.EVERY_TOKEN
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
            past: keys and values of each layer; guarded, the ledger's layers follow those of the decoder's blocks, and
                the second lane's follow the ledger's where every token is judged.
            extra: further tensors (batch, tokens), int64, that the family's forward takes.
        """
        # An input that a runtime leaves out is one zero, (1, 1); the product makes it as wide as the others.
        extra = {name: value * attention_mask[:, -inputs_embeds.shape[1] :] for name, value in extra.items()}
        fed = inputs_embeds
        inputs_embeds = inputs_embeds.to(past[0][0].dtype)
        cache = DynamicCache()
        cache.layers.extend(_filled(keys, values) for keys, values in past[: self.layers])
        graph, own = self.model.config.sasa["graph"], self.layers + self.shape.layers
        lane = None
        if self.guarded and self.every_token:
            lane = self.runtime.LiveLane(self.model, graph, [_filled(keys, values) for keys, values in past[own:]])
            lane.start = functools.partial(self.lane, lane.start)
        with self.runtime.recording(lane=lane) as seen:
            output = self.stock_forward(
                self.model, inputs_embeds=inputs_embeds, attention_mask=attention_mask,
                position_ids=position_ids, past_key_values=cache, use_cache=True, logits_to_keep=1,
                return_dict=True, **extra,
            )  # fmt: skip
        present = [(layer.keys, layer.values) for layer in cache.layers]
        if not self.guarded:
            return output.logits.float(), present
        kept = [tensor for pair in past[self.layers : own] for tensor in pair]  # (batch, heads, past, size) each
        projection = self.projection(self.runtime.project_taps, graph, seen)  # (batch, tokens, hidden)
        masks = {"attention_mask": attention_mask, **extra}
        columns, last, unjudged, is_read = self.turn(
            self._columns, fed, masks, seen.position_ids, past, kept, projection
        )
        # What only a call needs that may complete a prompt goes into a branch later on,
        context, turn = self.turn(self._turn, columns, last, kept)
        covered = turn.covered.to(columns)  # (batch, tokens)
        further: tuple[Any, ...]
        if lane is not None:
            probability, states = self.model._judge_all(turn, lane, kept[0].shape[2])  # (batch,), (batch, tokens)
            further = (states,)
        else:
            probability, judged = self._verdict(turn, context, projection, kept)  # (batch,), (batch, tokens)
            states = self.turn(self._states, turn, judged)  # (batch, tokens)
            going_on = self.turn(self._going_on, columns, last)  # (batch, tokens)
            further = (judged, turn.due.any(), states, covered, going_on, is_read)
        said = self.gate(self._said, states, unjudged)  # (batch, tokens)
        logits = self.gate(self._gate, output.logits.float(), said[:, -1:], attention_mask)
        present += self.ledger(self._ledger, columns, said, covered, projection, kept)
        if lane is not None:
            present += [(lane.layers[path].keys, lane.layers[path].values) for path in lane.paths]
        return logits, present, probability, *further

    def _verdict(
        self, turn: Any, context: torch.Tensor, projection: torch.Tensor, kept: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """P(unsafe) where a verdict is due, (batch,), and STATE (batch, tokens) by it.

        What only the verdict needs, from here to the probe, goes into a branch of its own.
        """
        graph = self.model.config.sasa["graph"]
        whole = torch.cat([self.shape.unpack_projection(kept), projection.to(kept[0].dtype)], dim=1)
        real = context[..., self.runtime.REAL] > 0  # (batch, context)
        arguments = self.runtime.context_arguments(self.model.model, whole, real, context, self.shape)
        values = self.runtime.run_lane(self.model, graph, whole, arguments, turn.judged, real)
        probability = next(values[node["name"]] for node in graph if node["op"] == "probe")  # (batch,)
        probability = probability.masked_fill(~turn.due, float("nan"))
        refused = ~(probability < self.model.config.sasa["threshold"])  # (batch,); NaN is refused
        return probability, turn.refused_states * refused[:, None]

    def _columns(
        self,
        fed: torch.Tensor,
        masks: dict[str, torch.Tensor],
        position_ids: torch.Tensor,
        past: list[Pair],
        kept: list[torch.Tensor],
        projection: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What every call needs.

        Returns the fed tokens' columns (batch, tokens, columns); the first five of the token before them, (batch, 5),
        all 0 where there is none; where nothing can be judged, (batch, tokens), bool, since the past has no ledger,
        or the mask shows or hides other tokens than were judged, or a real token's state is no number; and whether
        the call may complete a prompt, ().
        """
        runtime = self.runtime
        symbols = self.words.in_embeddings(fed, self.known)  # (batch, tokens)
        judged = kept[0].shape[2]
        columns = runtime.read_columns(masks, judged, fed, symbols, position_ids, self.shape)
        kinds = runtime.JUDGED + 1  # STATE to JUDGED, which is all that is wanted of the past here
        earlier = self.shape.unpack(kept, 0, kinds).round().to(columns)  # (batch, past, kinds)
        last = nn.functional.pad(earlier, (0, 0, 1, 0))[:, -1]  # (batch, kinds)
        # Lengths as tensors: as numbers they would be frozen into the graph.
        length, known, tokens = (_scalar(size) for size in (past[0][0].shape[2], judged, fed.shape[1]))
        shown = (masks["attention_mask"] != 0).to(columns)  # (batch, context)
        real = torch.cat([earlier[..., runtime.REAL], columns[..., runtime.REAL]], dim=1)  # (batch, context)
        changed = (shown - real).abs().amax(-1, keepdim=True) > 0  # (batch, 1)
        sound = runtime.is_sound(projection, columns[..., runtime.REAL] > 0)  # (batch, tokens)
        goes_on = runtime.goes_on(last, symbols, self.words)  # (batch,)
        return columns, last, (length != known) | changed | ~sound, (tokens != 1) | (~goes_on).any()

    def _turn(self, columns: torch.Tensor, last: torch.Tensor, kept: list[torch.Tensor]) -> tuple[torch.Tensor, Any]:
        """The columns of the whole context, (batch, context, columns), and what the call brings."""
        context = torch.cat([self.shape.unpack_columns(kept), columns], dim=1)  # (batch, context, columns)
        judged = kept[0].shape[2]
        known, tokens = _scalar(judged), _scalar(columns.shape[1])
        symbols, real, covered = (
            context[..., self.runtime.SYMBOL],
            context[..., self.runtime.REAL] > 0,
            context[..., self.runtime.JUDGED] > 0,
        )  # (batch, context)
        several = (tokens != 1) | (known == 0)  # ()
        before = last[:, self.runtime.STATE]  # (batch,)
        return context, self.runtime.read_turn(symbols, real, judged, several, before, covered, self.words)

    def _states(self, turn: Any, judged: torch.Tensor) -> torch.Tensor:
        """STATE of the fed tokens (batch, tokens), given what it is where a verdict is due."""
        return torch.where(turn.due[:, None], judged, turn.other_states)

    def _going_on(self, columns: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """STATE (batch, tokens) in a call that cannot complete a prompt."""
        real = columns[..., self.runtime.REAL] > 0  # (batch, tokens)
        states: torch.Tensor = self.runtime.states_going_on(last[:, self.runtime.STATE], real, self.words)
        return states

    def _said(self, states: torch.Tensor, unjudged: torch.Tensor) -> torch.Tensor:
        """STATE (batch, tokens) with a refusal where nothing can be judged."""
        return torch.where(unjudged, states.clamp_min(1), states)

    def _gate(self, logits: torch.Tensor, states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The gated logits (batch, 1, vocabulary), given STATE (batch, 1)."""
        refusal = tuple(self.model.config.sasa["refusal_token_ids"])
        nothing = attention_mask.amax(-1, keepdim=True) == 0  # (batch, 1): no prompt to judge
        states = torch.where(nothing, states.clamp_min(1), states)
        due = torch.tensor(refusal).index_select(0, (states[:, 0] - 1).clamp_min(0))[:, None]  # (batch, 1)
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
        runtime = self.runtime
        assert (runtime.STATE, runtime.JUDGED) == (0, runtime.POSITION - 1)
        middle, places = columns[..., 1 : runtime.JUDGED], columns[..., runtime.POSITION :]
        columns = torch.cat([states[..., None], middle, covered[..., None], places], dim=-1)
        rows = self.shape.pack(columns, projection[..., : self.shape.hidden], kept[0].dtype)
        grown = [torch.cat([before, row], dim=2) for before, row in zip(kept, rows, strict=True)]
        return list(zip(grown[::2], grown[1::2], strict=True))

    @property
    def count(self) -> int:
        """How many cache layers the graph has."""
        return self.layers + (gate_layers(self.model) if self.guarded else 0)


def gate_layers(model: Any) -> int:
    """How many cache layers a guarded model has behind those of its blocks: the ledger's, and a lane's own."""
    runtime: Any = sys.modules[type(model).__module__]
    sasa = model.config.sasa
    ledger = runtime.Ledger.of(model.config.get_text_config(decoder=True), sasa)
    return int(ledger.layers + runtime.lane_layers(sasa))


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
