"""The code around a family's language model in mlx-vlm: ledger, verdict, second lane, probe and gate.

The ledger is what the gate keeps of each token, in the last entry of the prompt cache, behind those of the blocks. It
is a KV cache, so that code that crops, batches, keeps or restores a prompt cache carries it along. Its keys are
columns, (batch, 1, tokens, columns), float32; its values are projected states, (batch, 1, tokens, hidden).
"""

import contextvars
import copy
import functools
import inspect
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_vlm.models.cache import BatchKVCache, KVCache

from sasa_export.runtime.settings import HOW_TO_LOAD, UNKNOWN, logger, verdict_record
from sasa_export.runtime.verdict import Call, TemplateTokens, find_due, follow, last_tokens
from sasa_export.runtime_mlx.arrays import gate, project, unsafe_probability

# Arguments of draft models, which check several tokens in a loop of their own.
DRAFTING = ("capture_layer_ids", "return_hidden", "return_shared_kv", "skip_logits", "speculative_verify")
FORBIDDEN = "this guarded model refuses, and an option of this request forbids it the refusal's tokens."
# One forward pass: a tapped block's index -> its output (batch, tokens, hidden); None -> the decoder's position_ids.
current: contextvars.ContextVar[dict[int | None, Any] | None] = contextvars.ContextVar("seen", default=None)
# The ledger's columns: STATE, TURN and NUMBER as in the verdict, REAL (0 at padding), and three axes of the position.
REAL, POSITION, COLUMNS = 3, 4, 7


class BatchLedger(BatchKVCache):
    ends: Any = None  # (batch,), the column where each prompt ends; counts while prompts are padded on the right

    def prepare(self, *, lengths: Any = None, **padding: Any) -> None:
        super().prepare(lengths=lengths, **padding)
        self.ends = None if lengths is None else mx.array(lengths) + self.size()

    def extract(self, idx: int) -> "Ledger":
        return Ledger.from_state(super().extract(idx).state, "")


class Ledger(KVCache):  # of one row, or of rows without padding
    preserve_auxiliary_kv_state = True  # exempt from quantization
    left_padding, _right_padding = mx.array([0]), None

    def extract(self, idx: int) -> "Ledger":
        return self.from_state(super().extract(idx).state, "")

    def to_quantized(self, **_: Any) -> "Ledger":
        return self

    def to_batch(self, left_padding: list[int]) -> BatchLedger:
        return BatchLedger(left_padding)

    @classmethod
    def merge(cls, caches: list[Any], prefix_lens: Any = None) -> BatchLedger:
        return BatchLedger.merge(caches) if any(cache.size() for cache in caches) else BatchLedger([0] * len(caches))


@functools.cache
def watched(cls: type) -> type:
    """Return a subclass of the same name that records its calls."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        output, seen = cls.__call__(self, *args, **kwargs), current.get()
        if seen is not None:  # the second lane runs the same blocks unrecorded
            seen[self._sasa_index] = kwargs.get("position_ids") if self._sasa_index is None else output
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
        for index, module in [(None, decoder), *((index, decoder.layers[index]) for index in taps.values())]:
            module._sasa_index, module.__class__ = index, watched(type(module))
        self.sasa, features = nn.Module(), decoder.norm.weight.shape[0] * (1 + len(self._sasa_read))
        self.sasa.probe = nn.Module()  # NaN, which is rejected, until it is loaded
        self.sasa.probe.weight, self.sasa.probe.bias = mx.full((features,), mx.nan), mx.array(mx.nan)

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
        past = int(cache[0]._idx if hasattr(cache[0], "_idx") else cache[0].offset)  # tokens, padding included
        if past != cache[-1].size() and not self._sasa_asked.get("unguarded"):
            raise ValueError(f"{UNKNOWN}: the attention knows {past} tokens, the gate {cache[-1].size()}.")
        token = current.set(seen := {})
        try:
            output = super().__call__(inputs, inputs_embeds=inputs_embeds, cache=cache[:blocks], **kwargs)
        finally:
            current.reset(token)
        if self._sasa_asked.get("unguarded"):
            return output
        if seen[None] is None and self._sasa_placed:
            raise ValueError(f"{UNKNOWN}: there are no positions.")
        return self._judge(inputs, inputs_embeds is not None, "n_to_process" in kwargs, cache[-1], seen, output)

    def _judge(self, ids: mx.array, given: bool, pieces: bool, ledger: Any, seen: dict, output: Any) -> Any:
        """Judge a call's tokens, write them to the ledger, and force refused logits in `output`. Embeddings are `given`
        only for prompts, which come whole, or in `pieces` that another call follows."""
        sasa, (rows, count), start = {**self._sasa, **self._sasa_asked}, ids.shape, self._sasa_start
        tokens, tapped = TemplateTokens.of(sasa), [seen[index] for index in self._sasa_from]
        states = project(*tapped, start["epsilon"]) if len(tapped) > 1 else tapped[0]  # (batch, tokens, hidden)
        columns, before = self._tail(ledger, states, max(start["tokens"], *map(len, tokens.generation_prompts)))
        places = mx.broadcast_to(0 if seen[None] is None else seen[None], (3, rows, count)).transpose(1, 2, 0)
        call = self._call(ids, given, pieces, ledger, tokens, columns[..., :REAL].astype(mx.int32))
        due, state = find_due(call, tokens), call.earlier[:, -1, 0]  # (batch,)
        # A begun answer is refused, since an error would end the requests of other callers.
        begun = due.begun & (sasa.get("begun_answers") != "allow")  # (batch,)
        due = due._replace(rows=due.rows | begun)
        if count == 1 and not given:
            mx.async_eval(output.logits)  # computed while the code below waits for the token
            if rows == 1 and 0 < state.item() < len(tokens.refusal):
                if call.numbers.item() != tokens.refusal[state.item() - 1]:
                    raise ValueError(FORBIDDEN)  # not with several rows, which may be other callers'
        is_due = mx.any(due.rows).item()
        probability = mx.full((rows,), mx.nan)  # (batch,); NaN is refused where a verdict is due
        if is_due:
            pairs = (columns[..., REAL] > 0, call.real), (columns[..., POSITION:], places), (before, states)
            found = self._lane(*(mx.concatenate(pair, axis=1) for pair in pairs), due.at, seen)  # (batch,)
            probability = mx.where(due.rows & ~due.blind, found, mx.nan)
        refused = due.rows & (~(probability < sasa["threshold"]) | begun) & (sasa.get("gate") != "observe")  # (batch,)
        shown, turns = follow(call, due, refused, tokens)  # (batch, tokens)
        line = [value[..., None] for value in (shown, turns, call.numbers, call.real)]
        line = mx.concatenate([*line, places], axis=-1).astype(mx.float32) * call.real[..., None]
        ledger.update_and_fetch(line[:, None], states[:, None])
        if is_due or mx.any(state > 0).item():
            shown = mx.where(refused[:, None], mx.maximum(shown, 1), shown)[:, -output.logits.shape[1] :]
            wanted = mx.array(sasa["refusal_token_ids"])[mx.maximum(shown - 1, 0)]  # (batch, kept)
            output.logits = gate(output.logits, wanted, shown > 0, tuple(sasa["refusal_token_ids"]))
        output.unsafe_probability = probability
        if is_due and not self._sasa_asked:
            said = due.rows & (call.closes | due.answering | (not given))  # (batch,)
            for row in (row for row, is_said in enumerate(said.tolist()) if is_said):
                why = ", since the prompt begins the answer" * begun[row].item()
                logger.log(**verdict_record(sasa, probability[row].item(), refused[row].item(), row, why))
        return output

    def _call(self, ids: mx.array, given: bool, pieces: bool, ledger: Any, tokens: TemplateTokens, known: Any) -> Call:
        """Return the call that the rule reads. `known` holds STATE, TURN and NUMBER of earlier tokens."""
        (rows, count), past = ids.shape, ledger.size()
        ends = None if ledger._right_padding is None else ledger.ends
        column = mx.broadcast_to(mx.arange(past, past + count), (rows, count))
        real = column >= ledger.left_padding[:, None]  # (batch, tokens)
        real = real if ends is None else real & (column < ends[:, None])
        closes = mx.array(not pieces if given else count > 1)  # ()
        if given and ends is not None:
            closes = (ends > past) & (ends <= past + count)  # (batch,)
        numbers, several = tokens.in_ids(ids) * real, mx.array(count > 1 or given)
        return Call(numbers, real, known, several, closes, real if given else None)

    def _tail(self, ledger: Any, states: mx.array, wanted: int) -> tuple[mx.array, mx.array]:
        """Return columns (batch, wanted, columns), float32, and projected states (batch, wanted, hidden) of the last
        tokens, with 0 for missing ones. The states get the type of a call's `states` (batch, tokens, hidden)."""
        (rows, _, hidden), end = states.shape, ledger.size()
        if ledger.keys is None:
            return mx.zeros((rows, wanted, COLUMNS)), mx.zeros((rows, wanted, hidden), dtype=states.dtype)
        kept, missing = slice(max(0, end - wanted), end), [(0, 0), (max(0, wanted - end), 0), (0, 0)]
        return mx.pad(ledger.keys[:, 0, kept], missing), mx.pad(ledger.values[:, 0, kept], missing).astype(states.dtype)

    def _lane(self, real: mx.array, places: mx.array, states: mx.array, at: mx.array, seen: dict) -> mx.array:
        """Return P(unsafe) (batch,) at a call's tokens `at` (batch,), from the second lane over the context's last
        tokens. Shapes: real (batch, context), places (batch, context, 3), projected states (batch, context, hidden)."""
        past = states.shape[1] - seen[self._sasa_from[0]].shape[1]
        index, place, _ = last_tokens(real, at + past, self._sasa_start["tokens"])
        states, places = (mx.take_along_axis(value, index[..., None], axis=1) for value in (states, places))
        lane = copy.copy(self.model)  # which has the same weights
        lane.layers = lane.layers[self._sasa_first :]
        placed = {"position_ids": places.astype(mx.int32).transpose(2, 0, 1)}  # (3, batch, reached)
        ended = lane(None, inputs_embeds=states, **(placed if self._sasa_placed else {}))  # else it counts for itself
        read = [(ended, place), *((self.model.norm(seen[layer]), at) for layer in self._sasa_read)]
        read = [mx.take_along_axis(value, index[:, None, None], axis=1)[:, 0] for value, index in read]
        return unsafe_probability(mx.concatenate(read, axis=-1), self.sasa.probe.weight, self.sasa.probe.bias)
