"""What runs around the family's forward: ledger, verdict, second lane, probe and gate."""

import contextvars
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sasa_export.runtime.formulas import gate, unsafe_probability
from sasa_export.runtime.host import UNKNOWN, check_start, find_cache, read_ledger, real_tokens, write_ledger
from sasa_export.runtime.lane import TYPES, Recording, context_arguments, run_lane, start
from sasa_export.runtime.ledger import NUMBER, PICTURE, Ledger
from sasa_export.runtime.settings import HOW_TO_LOAD
from sasa_export.runtime.verdict import Call, Due, TemplateTokens, find_due, follow

logger = logging.getLogger("sasa")  # a warning for each refusal, an info for each other verdict


@dataclass
class Request:
    """What `generate` was asked, and what came of it; None for whoever calls the model by hand."""

    end: int | None  # of the prompts, in tokens
    prompts: int
    logged: bool  # already, or not to be
    reached: int = 0  # how many tokens the attention saw in the last call, those of the cache among them
    verdicts: Tensor | None = None  # (3, rows), a row for each beam: was one due, P(unsafe), was it refused

    def reach(self, context: int) -> None:
        """ValueError where a call sees less than the prompt and what was said since: its past is lost to the gate."""
        if self.end is not None and context <= min(self.reached, self.end):
            raise ValueError(f"{UNKNOWN}: it sees {context} tokens, and {self.reached} were judged before it.")
        self.reached = context


current_request: contextvars.ContextVar[Request | None] = contextvars.ContextVar("request", default=None)


class Context(NamedTuple):
    """The tokens that the attention saw, and what the ledger keeps of them."""

    kept: list[Tensor]  # the ledger of the tokens before the call, (batch, heads, past, size) each; or nothing
    columns: Tensor  # (batch, tokens, columns), int64, of the call's tokens; STATE and TURN are still 0
    node: str  # that the second lane starts from
    projection: Tensor  # (batch, tokens, hidden), its value for the call's tokens
    real: Tensor  # (batch, context), bool: no padding


class Probe(nn.Module):
    """The linear probe: weight (features,) and bias (), float32 whatever the model is cast to."""

    def __init__(self, features: int) -> None:
        super().__init__()
        unset = float("nan")  # a probe that was never loaded must not pass for one
        self.weight = nn.Parameter(torch.full((features,), unset, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.full((), unset, dtype=torch.float32), requires_grad=False)

    def forward(self, state: Tensor) -> Tensor:
        """P(unsafe), (...), of the lane's state (..., features)."""
        return unsafe_probability(state, self.weight.to(state.device), self.bias.to(state.device))

    def _apply(self, fn: Callable, recurse: bool = True) -> "Probe":
        exact = {name: tensor.data for name, tensor in self.named_parameters()}
        super()._apply(fn, recurse)
        for name, tensor in self.named_parameters():  # model.half() and the like move the probe, but do not round it
            tensor.data = exact[name].to(tensor.device)
        return self

    def check(self) -> None:
        """Raise ValueError where the gate could not judge by it."""
        usable = self.weight.isfinite().all() & self.bias.isfinite() & self.weight.any()
        if not self.weight.is_meta and not usable:
            raise ValueError(f"sasa.probe is zero, NaN or infinite, so the gate cannot judge. {HOW_TO_LOAD}")


class Guard(nn.Module):
    """The gate of a guarded model; `sasa` is config.sasa, and read at each call."""

    def __init__(self, sasa: dict[str, Any], ledger: Ledger, features: int) -> None:
        super().__init__()
        self.settings, self.ledger = sasa, ledger
        self.probe = Probe(features)

    def forward(self, model: Any, kwargs: dict[str, Any], seen: Recording, output: Any) -> Any:
        """Judge what a call brought, keep it in the cache, and force the logits of its `output` where it is refused.
        The `unsafe_probability` (batch,), float32, is NaN where no verdict is due."""
        tokens = TemplateTokens.of(self.settings)
        handed = [value for args, named in seen.arguments.values() for value in (*args, *named.values())]
        cache = find_cache(handed, output.values(), kwargs.values())
        call, context = self._read(model, kwargs, seen, cache, tokens)
        due = find_due(call, tokens)
        probability = self._judge(model, context, due)  # (batch,)
        enforcing = self.settings.get("gate") != "observe"
        refused = due.rows & ~(probability < self.settings["threshold"]) & enforcing  # NaN could not be judged
        states, turns = follow(call, due, refused, tokens)  # (batch, tokens)
        columns = torch.cat([torch.stack([states, turns], dim=-1), context.columns[..., NUMBER:]], dim=-1)
        write_ledger(cache, self.ledger, columns, context.projection)
        if enforcing and self._any(states > 0):
            output.logits = self._force(output.logits, states, kwargs.get("logits_to_keep", 0))
        output["unsafe_probability"] = probability
        self._report(output, call, due, states[:, -1] > 0)
        return output

    def _any(self, flags: Tensor) -> bool:
        """Whether something happens in a call at all."""
        return bool(flags.any())

    def _read(
        self, model: Any, kwargs: dict[str, Any], seen: Recording, cache: Any, tokens: TemplateTokens
    ) -> tuple[Call, Context]:
        """What a call brought: for the rule, and for ledger and lane. ValueError where its past is not known."""
        numbers = tokens.numbers(kwargs.get("input_ids"), kwargs.get("inputs_embeds"), model)  # (batch, tokens)
        (batch, count), device, request = numbers.shape, numbers.device, current_request.get()
        node, projection = start(self.settings["graph"], seen)  # (batch, tokens, hidden)
        kept = read_ledger(cache, self.ledger, count)
        past = kept[0].shape[2] if kept else 0
        counted = torch.arange(past, past + count, device=device)[None]  # (1, tokens)
        positions = counted if seen.position_ids is None else seen.position_ids
        positions = (positions if positions.dim() > 2 else positions[None])[-self.ledger.axes :].to(device)
        real = real_tokens(kwargs.get("attention_mask"), past + count, numbers)  # (batch, context)
        if not kept:
            check_start(positions, real)
        if request is not None:
            request.reach(past + count)
        end = None if request is None else request.end
        earlier = self.ledger.tail(kept or self.ledger.empty(projection), max(1, len(tokens.generation_prompt)))
        # Lengths as tensors: as numbers they would be frozen into an exported graph.
        several = torch.full((), count, device=device) != 1  # ()
        closes = several if end is None else torch.tensor(past + count >= end, device=device)  # ()
        prompt = None if end is None else torch.arange(past, past + count, device=device) < end  # (tokens,)
        unset = torch.zeros_like(numbers)
        types = next((kwargs[name] for name in TYPES if kwargs.get(name) is not None), unset)
        if types.shape[1] != count:  # of the whole context, or, where tokens are drafted, of the prompt alone
            types = nn.functional.pad(types[:, past:], (0, count))[:, :count]
        digits = self.ledger.digits(positions.expand(self.ledger.axes, batch, count)).to(numbers)
        columns = torch.cat([torch.stack([unset, unset, numbers, types.to(numbers)], dim=-1), digits], dim=-1)
        call = Call(numbers, real[:, past:], earlier.to(device), several, closes, prompt)
        return call, Context(kept, columns, node, projection, real)

    def _judge(self, model: Any, context: Context, due: Due) -> Tensor:
        """P(unsafe) (batch,) by the second lane over the whole context, NaN in rows where no verdict is due."""
        if not self._any(due.rows):
            return torch.full(due.at.shape, float("nan"), device=due.at.device)
        graph, ledger, value = self.settings["graph"], self.ledger, context.projection
        earlier, states = ledger.unpack(context.kept or ledger.empty(value))  # of the tokens before
        states = torch.cat([states.to(value), value], dim=1)  # (batch, context, hidden)
        columns = torch.cat([earlier.to(context.columns), context.columns], dim=1)  # (batch, context, columns)
        positions = ledger.positions(columns)  # (batch, context), or (axes, batch, context)
        arguments = context_arguments(model, graph, states, context.real.long(), positions, columns[..., PICTURE])
        at = due.at + context.real.shape[1] - value.shape[1]  # (batch,)
        values = run_lane(model, graph, {context.node: states}, arguments, at)
        found = next(values[node["name"]] for node in graph if node["op"] == "probe")  # (batch,)
        return found.to(due.at.device).masked_fill(~due.rows, float("nan"))

    def _force(self, logits: Tensor, states: Tensor, keep: Any) -> Tensor:
        """The logits (batch, kept, vocabulary), forced where STATE (batch, tokens) says so."""
        refusal = tuple(self.settings["refusal_token_ids"])
        kept = keep.to(states.device) if isinstance(keep, Tensor) else slice(-keep if keep else None, None)
        states = states[:, kept].to(logits.device)  # (batch, kept)
        if states.shape != logits.shape[:2]:
            raise ValueError(f"the gate expects logits of {states.shape[1]} tokens, and these are of {logits.shape[1]}")
        wanted = torch.tensor(refusal, device=logits.device)[(states - 1).clamp_min(0)]  # (batch, kept)
        return gate(logits, wanted, states > 0, refusal)

    def _report(self, output: Any, call: Call, due: Due, held: Tensor) -> None:
        """Hand a call's verdicts to `generate` and the log; `held` (batch,): the row emits the refusal."""
        request = current_request.get()
        if self._any(due.rows) or (request is not None and request.verdicts is None):
            verdicts = torch.stack([due.rows.float(), output["unsafe_probability"], held.float()])  # (3, batch)
            self._log(request, verdicts, bool(call.closes))

    @torch.compiler.disable
    def _log(self, request: Request | None, verdicts: Tensor, last: bool) -> None:
        """Log a call's verdicts (3, batch), and no word of the prompt; `generate` takes them, and logs the `last`."""
        if request is not None:
            earlier = verdicts if request.verdicts is None else request.verdicts
            # Anew in a later piece of a prompt, and in each call without a cache.
            request.verdicts = torch.where(verdicts[0] > 0, verdicts, earlier)
            beams = max(1, earlier.shape[1] // request.prompts)
            verdicts = request.verdicts[:, ::beams] if last and not request.logged else verdicts[:, :0]
            request.logged |= last
        limit, would = self.settings["threshold"], "would be " * (self.settings.get("gate") == "observe")
        for row, found in ((row, found) for row, (due, found) in enumerate(verdicts[:2].T.tolist()) if due):
            level, what = (logging.INFO, "allowed") if found < limit else (logging.WARNING, f"{would}refused")
            said = {"probability": found, "threshold": limit, "verdict": what, "row": row}  # for formatters
            logger.log(level, "%s: P(unsafe) %.4f, threshold %.4f", what, found, limit, extra=said)
