"""The code around the family's forward: ledger, verdict, second lane, probe and gate."""

import contextvars
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sasa_export.runtime.formulas import gate, unsafe_probability
from sasa_export.runtime.host import check_start, find_cache, numbers, read_ledger, real_tokens, write_ledger
from sasa_export.runtime.lane import TYPES, Recording, Values, at_judged, context_arguments, reached, run_lane, start
from sasa_export.runtime.ledger import NUMBER, PICTURE, Ledger
from sasa_export.runtime.settings import HOW_TO_LOAD, UNKNOWN, check_settings, logger, verdict_record
from sasa_export.runtime.verdict import Call, Due, TemplateTokens, find_due, follow

BEGUN = (
    "the prompt begins the answer, or leaves a turn open, and this guarded model judges at the generation prompt. End "
    "it there; or, where no caller can begin answers, load with sasa={'begun_answers': 'allow'}."
)


@dataclass
class Request:
    """The state of one `generate` call. Direct calls of the model have none, not even during `generate`."""

    model: Any
    given: int  # tokens per prompt, as passed to `generate`
    prompts: int
    pieces: bool  # the prompts come in several calls
    drafting: bool  # draft tokens follow the prompts
    logged: bool  # verdicts are logged already, or must not be
    end: int | None = None  # context length where the prompts end; None until all of them have come
    reached: int = 0  # context length after the last call, tokens in the cache included
    streamed: int | None = None  # answer tokens that a streamer got; None before it got the prompts
    verdicts: Tensor | None = None  # (3, rows), one row per beam: is a verdict due, P(unsafe), is it refused

    def reach(self, past: int, count: int) -> int:
        """Return the context length where the prompts end, or, while they come in pieces, the length so far. The call
        adds `count` tokens behind `past`. After the prompts, each call brings one sampled token, or drafts. Raise
        ValueError for any other tokens: the gate has not judged them, or has lost their past."""
        context = past + count
        if self.end is not None:
            right = context > self.end if self.drafting else context == self.reached + 1
        elif self.drafting:
            right, self.end = past == 0 and context >= self.given, self.given
        elif self.pieces:
            right, self.end = context <= self.given, context if context == self.given else None
        else:
            right, self.end = True, context
        if not right:
            what = f"{count} tokens come behind {past}, where {self.reached} were judged and {self.given} given"
            raise ValueError(f"{UNKNOWN}: {what}.")
        self.reached = context
        return self.end or context

    def check(self, said: int) -> None:
        """Raise ValueError if an answer has `said` tokens and the gate did not see the tokens that they follow from."""
        if self.verdicts is None or self.end is None or said > self.reached - self.end + 1:  # the last one is not fed
            raise ValueError(f"{UNKNOWN}: {said} tokens were said, and the gate has not seen what they follow from.")

    def stream(self, put: Callable, tokens: Tensor) -> None:
        """Pass prompts, then answer tokens, (rows, tokens) or (rows,), to a streamer. Raise ValueError like `check`."""
        if self.streamed is None:
            self.streamed = 0
        else:
            self.streamed += tokens.shape[1] if tokens.dim() > 1 else 1
            self.check(self.streamed)
        put(tokens)


current_request: contextvars.ContextVar[Request | None] = contextvars.ContextVar("request", default=None)


class Context(NamedTuple):
    """The context of a call: the ledger of earlier tokens, and values for the call's own tokens."""

    kept: list[Tensor]  # the ledger of earlier tokens, (batch, heads, past, size) each; empty without any
    columns: Tensor  # (batch, tokens, columns), int64, of the call's tokens; STATE and TURN are still 0
    node: str  # name of the node where the second lane starts
    projection: Tensor  # (batch, tokens, hidden), that node's value for the call's tokens
    outputs: Values  # of the tapped blocks, (batch, tokens, hidden)
    real: Tensor  # (batch, context), bool, False at padding


class Probe(nn.Module):
    """The linear probe: weight (features,) and bias (). It stays float32 when the model is cast."""

    def __init__(self, features: int) -> None:
        super().__init__()
        unset = float("nan")  # until it is loaded; `check` rejects NaN
        self.weight = nn.Parameter(torch.full((features,), unset, dtype=torch.float32), requires_grad=False)
        self.register_buffer("bias", torch.full((), unset, dtype=torch.float32))  # FSDP takes no scalar parameter

    def forward(self, state: Tensor) -> Tensor:
        """Return P(unsafe), (...), of the probe's input `state` (..., features)."""
        return unsafe_probability(state, self.weight.to(state.device), self.get_buffer("bias").to(state.device))

    def _apply(self, fn: Callable, recurse: bool = True) -> "Probe":
        # model.half() and similar calls move the probe, but must not round it.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def check(self) -> None:
        """Raise ValueError if the probe is zero, NaN or infinite. A probe on the meta device passes."""
        usable = self.weight.isfinite().all() & self.get_buffer("bias").isfinite() & self.weight.any()
        if not self.weight.is_meta and not usable:
            raise ValueError(f"sasa.probe is zero, NaN or infinite, so the gate cannot judge. {HOW_TO_LOAD}")


class Guard(nn.Module):
    """The gate of a guarded model. Each call reads and checks the settings in `config.sasa`."""

    def __init__(self, config: Any, ledger: Ledger, features: int) -> None:
        super().__init__()
        self.config, self.graph, self.ledger = config, config.sasa["graph"], ledger
        self.probe = Probe(features)
        self.asked: dict[str, Any] = {}  # overrides by `prove`, also with values that no operator may set

    def forward(self, model: Any, kwargs: dict, seen: Recording, output: Any, request: Request | None = None) -> Any:
        """Judge a call's tokens, write them to the cache's ledger, and force refused logits. Return `output` with its
        `unsafe_probability` (batch,), float32, NaN where no verdict is due. `generate` sends its `request`."""
        sasa = {**check_settings(self.config.sasa), **self.asked}
        tokens = TemplateTokens.of(sasa)
        handed = [value for args, named in seen.arguments.values() for value in (*args, *named.values())]
        cache = find_cache(handed, output.values(), kwargs.values())
        call, context = self._read(model, kwargs, seen, cache, tokens, request)
        due = find_due(call, tokens)
        enforcing = sasa.get("gate") != "observe"
        if request is not None and enforcing and sasa.get("begun_answers") != "allow" and self._any(due.begun):
            raise ValueError(BEGUN)
        if request is not None and request.pieces and self._any(due.blind):
            raise ValueError(f"{UNKNOWN}: a row has padding alone in it. Pad prompts that come in pieces on the left.")
        probability = self._judge(model, context, due)  # (batch,)
        refused = due.rows & ~(probability < sasa["threshold"]) & enforcing  # NaN is refused
        states, turns = follow(call, due, refused, tokens)  # (batch, tokens)
        columns = torch.cat([torch.stack([states, turns], dim=-1), context.columns[..., NUMBER:]], dim=-1)
        write_ledger(cache, self.ledger, columns, context.projection)
        shown = torch.where(refused[:, None], states.clamp_min(1), states)  # (batch, tokens): also before the verdict
        if enforcing and self._any(shown > 0):
            output.logits = self._force(output.logits, shown, kwargs.get("logits_to_keep", 0), sasa)
        output["unsafe_probability"] = probability
        self._report(output, call, due, states[:, -1] > 0, request)
        return output

    def _any(self, flags: Tensor) -> bool:
        """Return whether any flag is set. The export to ONNX overrides this, to keep every step."""
        return bool(flags.any())

    def _read(self, model: Any, kwargs: dict, seen: Any, cache: Any, tokens: Any, request: Any) -> tuple[Call, Context]:
        """Return a call's tokens, for the rule, and their context. Raise ValueError where their past is unknown."""
        found = numbers(tokens, kwargs.get("input_ids"), kwargs.get("inputs_embeds"), model)  # (batch, tokens)
        (batch, count), device = found.shape, found.device
        node, projection, outputs = start(self.graph, seen)  # (batch, tokens, hidden)
        kept = read_ledger(cache, self.ledger, count)
        past = kept[0].shape[2] if kept else 0
        counted = torch.arange(past, past + count, device=device)[None]  # (1, tokens)
        positions = counted if seen.position_ids is None else seen.position_ids
        positions = (positions if positions.dim() > 2 else positions[None])[-self.ledger.axes :].to(device)
        if positions.shape[-1] != count:
            raise ValueError(f"{UNKNOWN}: there are positions of {positions.shape[-1]} tokens, and {count} tokens.")
        real = real_tokens(kwargs.get("attention_mask"), past + count, found)  # (batch, context)
        if not kept:
            check_start(positions, real)
        elif request is not None and (count > 1 or not request.reached):
            known = self.ledger.positions(self.ledger.unpack(kept)[0]).to(device)  # (batch, past), or with axes first
            check_start(positions, real, known if known.dim() > 2 else known[None])
        end = None if request is None else request.reach(past, count)
        earlier = self.ledger.tail(kept or self.ledger.empty(projection), max(1, *map(len, tokens.generation_prompts)))
        # Lengths are tensors, since an exported graph would freeze plain numbers.
        several = torch.full((), count, device=device) != 1  # ()
        closes = several if request is None else torch.tensor(request.end is not None, device=device)  # ()
        prompt = None if end is None else torch.arange(past, past + count, device=device) < end  # (tokens,)
        unset = torch.zeros_like(found)
        types = next((kwargs[name] for name in TYPES if kwargs.get(name) is not None), unset)
        if types.shape[1] != count:  # they cover the whole context, or, with drafts, only the prompt
            types = nn.functional.pad(types[:, past:], (0, count))[:, :count]
        digits = self.ledger.digits(positions.expand(self.ledger.axes, batch, count)).to(found)
        columns = torch.cat([torch.stack([unset, unset, found, types.to(found)], dim=-1), digits], dim=-1)
        call = Call(found, real[:, past:], earlier.to(device), several, closes, prompt)
        return call, Context(kept, columns, node, projection, outputs, real)

    def _judge(self, model: Any, context: Context, due: Due) -> Tensor:
        """Return P(unsafe) (batch,), from the second lane. It is NaN where no verdict is due or can be read."""
        if not self._any(due.rows):
            return torch.full(due.at.shape, float("nan"), device=due.at.device)
        graph, ledger, value = self.graph, self.ledger, context.projection
        earlier, states = ledger.unpack(context.kept or ledger.empty(value))  # of the tokens before
        states = torch.cat([states.to(value), value], dim=1)  # (batch, context, hidden)
        columns = torch.cat([earlier.to(context.columns), context.columns], dim=1)  # (batch, context, columns)
        positions = ledger.positions(columns)  # (batch, context), or (axes, batch, context)
        at = due.at + context.real.shape[1] - value.shape[1]  # (batch,)
        at, real, states, *others = reached(graph, at, context.real, states, positions, columns[..., PICTURE])
        arguments = context_arguments(model, graph, states, real.long(), *others)
        values = run_lane(model, graph, {**at_judged(context.outputs, due.at), context.node: states}, arguments, at)
        found = next(values[node["name"]] for node in graph if node["op"] == "probe")  # (batch,)
        return found.to(due.at.device).masked_fill(~due.rows | due.blind, float("nan"))

    def _force(self, logits: Tensor, states: Tensor, keep: Any, sasa: dict[str, Any]) -> Tensor:
        """Force logits (batch, kept, vocabulary) where STATE (batch, tokens) is not 0. `keep` is `logits_to_keep`."""
        refusal = tuple(sasa["refusal_token_ids"])
        kept = slice(-keep if keep else None, None) if isinstance(keep, int) else keep
        kept = kept.to(states.device) if isinstance(kept, Tensor) else kept
        states = states[:, kept].to(logits.device)  # (batch, kept)
        if isinstance(kept, Tensor) and not torch.compiler.is_exporting() and (states > 0).any():
            # A caller that selects logits by position, such as transformers' decision pipeline, reads them as scores.
            raise ValueError("this guarded model refuses the prompt, so that none of its logits can be read as scores.")
        if states.shape != logits.shape[:2]:
            raise ValueError(f"the gate expects logits of {states.shape[1]} tokens, and these are of {logits.shape[1]}")
        wanted = torch.tensor(refusal, device=logits.device)[(states - 1).clamp_min(0)]  # (batch, kept)
        return gate(logits, wanted, states > 0, refusal)

    def _report(self, output: Any, call: Call, due: Due, held: Tensor, request: Request | None) -> None:
        """Pass a call's verdicts to `generate` and the log. `held` (batch,) marks rows that emit the refusal."""
        if self._any(due.rows) or (request is not None and request.verdicts is None):
            verdicts = torch.stack([due.rows.float(), output["unsafe_probability"], held.float()])  # (3, batch)
            self._log(request, verdicts, bool(call.closes))

    @torch.compiler.disable
    def _log(self, request: Request | None, verdicts: Tensor, last: bool) -> None:
        """Log verdicts (3, batch), no prompt text. A `generate` request stores them, and logs with the `last` piece."""
        if request is not None:
            earlier = verdicts if request.verdicts is None else request.verdicts
            # Later pieces of a prompt, and calls without a cache, replace earlier verdicts.
            request.verdicts = torch.where(verdicts[0] > 0, verdicts, earlier)
            beams = max(1, earlier.shape[1] // request.prompts)
            verdicts = request.verdicts[:, ::beams] if last and not request.logged else verdicts[:, :0]
            request.logged |= last
        for row, found in ((row, found) for row, (due, found) in enumerate(verdicts[:2].T.tolist()) if due):
            logger.log(**verdict_record(self.config.sasa, found, False, row))
