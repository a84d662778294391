"""The code around a family's language model in mlx-vlm: ledger, verdict, second lane, probe and gate."""

import contextlib
import contextvars
import functools
import inspect
import logging
import math
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_vlm.models.cache import KVCache

from sasa_export.runtime.settings import HOW_TO_LOAD, verdict_record
from sasa_export.runtime.verdict import Call, TemplateTokens, find_due, follow, last_tokens
from sasa_export.runtime_mlx.formulas import gate, project, unsafe_probability
from sasa_export.runtime_mlx.ledger import POSITION, REAL, BatchLedger, Ledger, length, tail

logger = logging.getLogger("sasa")  # refusals are warnings, all other verdicts infos
UNKNOWN = "The gate of this guarded model has not judged what stands before this call. Start from the whole prompt"
# Arguments of draft models, which check several tokens in a loop of their own.
DRAFTING = ("capture_layer_ids", "return_hidden", "return_shared_kv", "skip_logits", "speculative_verify")
FORBIDDEN = "this guarded model refuses, and an option of this request forbids it the refusal's tokens."
# One forward pass: a block's index -> its output (batch, tokens, hidden); "positions" -> the decoder's position_ids;
# "first" -> the first block that runs, above 0 in the second lane.
Seen = dict[Any, Any]
current: contextvars.ContextVar[Seen | None] = contextvars.ContextVar("seen", default=None)


@contextlib.contextmanager
def recording(first: int = 0) -> Iterator[Seen]:
    token = current.set(seen := {"first": first})
    try:
        yield seen
    finally:
        current.reset(token)


@functools.cache
def watched(cls: type) -> type:
    """Return a subclass of the same name that records its calls in the current recording."""
    signature = inspect.signature(cls.__call__)

    def call(self: Any, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        seen = current.get()
        if seen is None:
            return cls.__call__(self, x, *args, **kwargs)
        if self._sasa_index is None:  # the decoder
            seen["positions"] = signature.bind(self, x, *args, **kwargs).arguments.get("position_ids")
        elif self._sasa_index < seen["first"]:
            return x
        output = cls.__call__(self, x, *args, **kwargs)
        if self._sasa_kept:
            seen[self._sasa_index] = output
        return output

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})


class Guarded:
    """Mixin for the class of a family's language model, added to an existing instance."""

    fused_greedy_decode = None  # off: a family's shortcut from state to token, which skips the logits

    def guard(self, sasa: dict[str, Any]) -> None:
        """Set up the gate from config.sasa. Raise ValueError if its graph does not fit this model."""
        graph, decoder = sasa["graph"], self.model
        taps = {node["name"]: node["index"] for node in graph if node["op"] == "tap"}
        start = next((node for node in graph if node["op"] == "projection"), {"inputs": list(taps), "tokens": 1})
        count = sum(node["op"] == "block" for node in graph)
        if count != len(decoder.layers) or not start.get("tokens") or any(n["op"] == "lane_head" for n in graph):
            raise ValueError(f"config.sasa's graph is none that the gate in mlx-vlm can run here. {HOW_TO_LOAD}")
        self._sasa, self._sasa_start, self._sasa_asked = sasa, start, {}  # overrides by `prove`
        self._sasa_first = next((node["index"] for node in graph if node["op"] == "lane_block"), count)
        self._sasa_from = [taps[name] for name in start["inputs"]]
        self._sasa_read = [taps[node["inputs"][0]] for node in graph if node["op"] == "state_norm"]
        self._sasa_placed = "position_ids" in inspect.signature(type(decoder).__call__).parameters
        for index, module in [(None, decoder), *enumerate(decoder.layers)]:
            module._sasa_index, module._sasa_kept, module.__class__ = (
                index,
                index in taps.values(),
                watched(type(module)),
            )
        features = decoder.norm.weight.shape[0] * (1 + len(self._sasa_read))
        self.sasa, unset = nn.Module(), math.nan  # until the probe is loaded; NaN is rejected
        self.sasa.probe = nn.Module()
        self.sasa.probe.weight, self.sasa.probe.bias = mx.full((features,), unset), mx.array(unset)

    def make_cache(self) -> list[Any]:
        return [*(KVCache() for _ in self.model.layers), Ledger()]

    def __call__(self, inputs: Any, inputs_embeds: Any = None, mask: Any = None, cache: Any = None, **kwargs: Any):
        blocks, cache = len(self.model.layers), self.make_cache() if cache is None else cache
        if any(kwargs.get(name) not in (None, False) for name in DRAFTING):
            raise ValueError("this guarded model cannot judge what a draft model proposes. Run without a draft model.")
        if inputs is None or mask is not None:
            raise ValueError("this guarded model reads token ids, and caches that know of padding, but no mask.")
        if len(cache) != blocks + 1 or not isinstance(cache[-1], Ledger | BatchLedger):
            raise ValueError(f"{UNKNOWN}, with a cache of this model's make_cache().")
        if self._sasa_asked.get("unguarded"):
            return super().__call__(inputs, inputs_embeds=inputs_embeds, cache=cache[:blocks], **kwargs)
        if length(cache[0]) != length(cache[-1]):
            raise ValueError(f"{UNKNOWN}: the attention knows {length(cache[0])} tokens, the gate {length(cache[-1])}.")
        with recording() as seen:
            output = super().__call__(inputs, inputs_embeds=inputs_embeds, cache=cache[:blocks], **kwargs)
        if seen["positions"] is None and self._sasa_placed:
            raise ValueError(f"{UNKNOWN}: there are no positions.")
        return self._judge(inputs, inputs_embeds is not None, "n_to_process" in kwargs, cache[-1], seen, output)

    def _judge(self, ids: mx.array, given: bool, pieces: bool, ledger: Any, seen: Seen, output: Any) -> Any:
        """Judge a call's tokens, write them to the ledger, and force refused logits in `output`. Embeddings are `given`
        only for prompts, which come whole, or in `pieces` that another call follows."""
        sasa, (rows, count), start = {**self._sasa, **self._sasa_asked}, ids.shape, self._sasa_start
        tokens, tapped = TemplateTokens.of(sasa), [seen[index] for index in self._sasa_from]
        states = project(*tapped, start["epsilon"]) if len(tapped) > 1 else tapped[0]  # (batch, tokens, hidden)
        earlier = tail(ledger, states, max(start["tokens"], *map(len, tokens.generation_prompts)))
        known = earlier[0][..., :REAL].astype(mx.int32)  # (batch, ..., 3)
        places = mx.zeros((3, 1, 1)) if seen["positions"] is None else seen["positions"]
        places = mx.broadcast_to(places, (3, rows, count)).transpose(1, 2, 0)  # (batch, tokens, 3)
        call = self._call(ids, given, pieces, ledger, tokens, known)
        due, fits = find_due(call, tokens), sasa.get("begun_answers") == "allow" or not given
        if not fits:  # a begun answer is refused, since an error would end the requests of other callers
            last = last_tokens(call.real, mx.full((rows,), count), 1)[0][:, 0]  # (batch,)
            due = due._replace(rows=due.rows | due.begun, at=mx.where(due.begun, last, due.at))
        if count == 1 and not given:
            mx.async_eval(output.logits)  # computed while the code below waits for the token
            if rows == 1 and 0 < known[0, -1, 0].item() < len(tokens.refusal):
                if call.numbers.item() != tokens.refusal[known[0, -1, 0].item() - 1]:
                    raise ValueError(FORBIDDEN)  # not with several rows, which may be other callers'
        is_due, held = mx.any(due.rows).item(), mx.any(known[:, -1, 0] > 0).item()
        probability, refused = mx.full((rows,), math.nan), mx.zeros((rows,), dtype=mx.bool_)  # (batch,)
        if is_due:
            new = mx.concatenate([mx.zeros((rows, count, REAL)), call.real[..., None], places], axis=-1)
            context = [mx.concatenate(pair, axis=1) for pair in zip(earlier, (new, states), strict=True)]
            probability = mx.where(due.rows & ~due.blind, self._lane(*context, due.at, seen), math.nan)
            refused = due.rows & (~(probability < sasa["threshold"]) | (due.begun & (not fits)))  # NaN is refused
            refused = refused & (sasa.get("gate") != "observe")
        found, turns = follow(call, due, refused, tokens)  # (batch, tokens)
        line = [value.astype(mx.float32)[..., None] for value in (found, turns, call.numbers, call.real)]
        line = mx.concatenate([*line, places.astype(mx.float32)], axis=-1) * call.real[..., None]
        ledger.update_and_fetch(line[:, None], states[:, None])
        if is_due or held:
            shown = mx.where(refused[:, None], mx.maximum(found, 1), found)  # (batch, tokens)
            shown = shown[:, shown.shape[1] - output.logits.shape[1] :]  # (batch, kept)
            wanted = mx.array(sasa["refusal_token_ids"])[mx.maximum(shown - 1, 0)]  # (batch, kept)
            output.logits = gate(output.logits, wanted, shown > 0, tuple(sasa["refusal_token_ids"]))
        output.unsafe_probability = probability
        if is_due and not self._sasa_asked:
            said = due.rows & (call.closes | due.answering | (not given))  # (batch,)
            for row in (row for row, is_said in enumerate(said.tolist()) if is_said):
                why = ", since the prompt begins the answer" * (due.begun[row].item() and not fits)
                logger.log(**verdict_record(sasa, probability[row].item(), refused[row].item(), row, why))
        return output

    def _call(self, ids: mx.array, given: bool, pieces: bool, ledger: Any, tokens: TemplateTokens, known: Any) -> Call:
        """Return the call that the rule reads. `known` holds the columns of earlier tokens."""
        count, at = ids.shape[1], length(ledger)
        real = mx.broadcast_to(ledger.real(*ids.shape), ids.shape)  # (batch, tokens)
        closes = mx.array(not pieces if given else count > 1)  # ()
        if given and ledger.ends is not None:
            closes = (ledger.ends > at) & (ledger.ends <= at + count)  # (batch,)
        numbers, several = tokens.in_ids(ids) * real, mx.array(count > 1 or given)
        return Call(numbers, real, known, several, closes, real if given else None)

    def _lane(self, columns: mx.array, states: mx.array, at: mx.array, seen: Seen) -> mx.array:
        """Return P(unsafe) (batch,) at a call's tokens `at` (batch,), from the second lane over the context's last
        tokens. Shapes: columns (batch, context, columns), projected states (batch, context, hidden)."""
        past = columns.shape[1] - seen[self._sasa_from[0]].shape[1]
        index, place, _ = last_tokens(columns[..., REAL] > 0, at + past, self._sasa_start["tokens"])
        states, columns = (mx.take_along_axis(value, index[..., None], axis=1) for value in (states, columns))
        placed = columns[..., POSITION:].astype(mx.int32).transpose(2, 0, 1)  # (3, batch, reached)
        with recording(self._sasa_first):  # without position_ids, a decoder needs only relative positions
            ended = self.model(None, inputs_embeds=states, **({"position_ids": placed} if self._sasa_placed else {}))
        read = [(ended, place), *((self.model.norm(seen[layer]), at) for layer in self._sasa_read)]
        read = [mx.take_along_axis(value, index[:, None, None], axis=1)[:, 0] for value, index in read]
        probe = self.sasa.probe
        return unsafe_probability(mx.concatenate(read, axis=-1), probe.weight, probe.bias)  # (batch,)
