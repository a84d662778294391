"""What runs around the family's forward: ledger, verdict, second lane, probe and gate."""

import contextvars
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from sasa_export.runtime.formulas import gate, unsafe_probability
from sasa_export.runtime.lane import TYPES, Recording, context_arguments, project_taps, run_lane
from sasa_export.runtime.ledger import NUMBER, PICTURE, Ledger
from sasa_export.runtime.settings import HOW_TO_LOAD
from sasa_export.runtime.verdict import Call, TemplateTokens, find_due, follow

logger = logging.getLogger("sasa")  # a warning for each refusal, an info for each other verdict


@dataclass
class Asked:
    """What `generate` was asked, and what came of it; None for whoever calls the model by hand."""

    end: int | None  # of the prompts, in tokens
    prompts: int
    logged: bool  # already, or not to be
    verdicts: Tensor | None = None  # (3, rows), a row for each beam: was one due, P(unsafe), was it refused


asked: contextvars.ContextVar[Asked | None] = contextvars.ContextVar("asked", default=None)


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
        self.witness: Any = None  # by which an exported graph notices that its weights are others

    def forward(self, model: Any, kwargs: dict[str, Any], kept: list[Tensor], seen: Recording, output: Any) -> Any:
        """Judge what a call brought, keep it in the cache, whose ledger was `kept` before, and gate the logits of its
        `output`. The `unsafe_probability` (batch,), float32, is NaN where no verdict is due."""
        graph, tokens = self.settings["graph"], TemplateTokens.of(self.settings)
        entry, projection = project_taps(graph, seen)  # (batch, tokens, hidden)
        kept = kept or self.ledger.empty(projection)
        call, real, columns = self._read(model, kwargs, kept, seen.position_ids, tokens)
        if self.witness is not None:
            first = real & (real.cumsum(-1) == 1)  # (batch, context)
            projection = self.witness(projection, kwargs["inputs_embeds"], first[:, kept[0].shape[2] :])
        due = find_due(call, tokens)
        exporting, observing, told = torch.compiler.is_exporting(), self.settings.get("gate") == "observe", asked.get()
        probability = torch.full(due.at.shape, float("nan"), device=due.at.device)  # (batch,)
        judging = exporting or bool(due.rows.any())  # what an exported graph keeps in a branch
        if judging:
            found = self._run_lane(model, entry, projection, kept, columns, real, due.at).to(due.at.device)  # (batch,)
            probability = found.masked_fill(~due.rows, float("nan"))
        refused = due.rows & ~(probability < self.settings["threshold"])  # (batch,); NaN could not be judged
        refused = torch.zeros_like(refused) if observing else refused
        states, turns = follow(call, due, refused, tokens)  # (batch, tokens)
        columns = torch.cat([torch.stack([states, turns], dim=-1), columns[..., NUMBER:]], dim=-1)
        self._keep(output.past_key_values, columns, projection)
        if not observing and (exporting or states.any()):
            output.logits = self._gate(output.logits, states, kwargs.get("logits_to_keep", 0))
        output["unsafe_probability"] = probability
        if exporting:
            output["is_due"] = due.rows.any()
        elif judging or (told is not None and told.verdicts is None):
            held = (states[:, -1] > 0) & (not observing)  # (batch,)
            self._tell(told, torch.stack([due.rows.float(), probability, held.float()]), bool(call.closes))
        return output

    @torch.compiler.disable
    def _tell(self, told: Asked | None, verdicts: Tensor, last: bool) -> None:
        """Log a call's verdicts (3, batch), and no word of the prompt; `generate` takes them, and logs the `last`."""
        if told is not None:
            earlier = verdicts if told.verdicts is None else told.verdicts
            told.verdicts = torch.where(verdicts[0] > 0, verdicts, earlier)  # of a later piece, or without cache anew
            beams = max(1, earlier.shape[1] // told.prompts)
            verdicts = told.verdicts[:, ::beams] if last and not told.logged else verdicts[:, :0]
            told.logged |= last
        limit, would = self.settings["threshold"], "would be " * (self.settings.get("gate") == "observe")
        for found in verdicts[1, verdicts[0] > 0].tolist():  # those that were due
            level, what = (logging.INFO, "allowed") if found < limit else (logging.WARNING, f"{would}refused")
            logger.log(level, "%s: P(unsafe) %.4f, threshold %.4f", what, found, limit)

    def _read(
        self, model: Any, kwargs: dict[str, Any], kept: list[Tensor], positions: Any, tokens: TemplateTokens
    ) -> tuple[Call, Tensor, Tensor]:
        """What a call brings: for the rule; which tokens of the context are real, (batch, context); and the ledger's
        columns of its tokens, (batch, tokens, columns), int64, in which STATE and TURN are still 0."""
        ids, embeddings = kwargs.get("input_ids"), kwargs.get("inputs_embeds", torch.empty(0))
        if ids is not None:
            numbers = tokens.in_ids(ids)  # (batch, tokens)
        else:
            table = torch.tensor(tokens.table, device=embeddings.device)  # (numbers,)
            numbers = tokens.in_embeddings(embeddings, model.get_input_embeddings()(table))  # (batch, tokens)
        (batch, count), past, device = numbers.shape, kept[0].shape[2], numbers.device
        end = getattr(asked.get(), "end", None)
        real = real_tokens(kwargs.get("attention_mask"), past + count, numbers)  # (batch, context)
        earlier = self.ledger.tail(kept, max(1, len(tokens.generation_prompt))).to(device)  # (batch, length, 3)
        # Lengths as tensors: as numbers they would be frozen into an exported graph.
        several = torch.full((), count, device=device) != 1  # ()
        closes = several if end is None else torch.tensor(past + count >= end, device=device)  # ()
        prompt = None if end is None else torch.arange(past, past + count, device=device) < end  # (tokens,)
        unset = torch.zeros_like(numbers)
        types = next((kwargs[name] for name in TYPES if kwargs.get(name) is not None), unset)
        if types.shape[1] != count:  # of the whole context, or, where tokens are drafted, of the prompt alone
            types = torch.nn.functional.pad(types[:, past:], (0, count))[:, :count]
        types = types.to(numbers)  # (batch, tokens)
        if positions is None:
            positions = torch.arange(past, past + count, device=device)[None]  # (1, tokens)
        positions = (positions if positions.dim() > 2 else positions[None])[-self.ledger.axes :].to(device)
        digits = self.ledger.digits(positions.expand(self.ledger.axes, batch, count)).to(numbers)
        columns = torch.cat([torch.stack([unset, unset, numbers, types], dim=-1), digits], dim=-1)
        return Call(numbers, real[:, past:], earlier, several, closes, prompt), real, columns

    def _run_lane(
        self, model: Any, name: str, value: Tensor, kept: list[Tensor], columns: Tensor, real: Tensor, at: Tensor
    ) -> Tensor:
        """P(unsafe) (batch,) by the second lane over the whole context, read at one of the call's tokens a row."""
        earlier, states = self.ledger.unpack(kept)  # of the tokens before
        states = torch.cat([states.to(value), value], dim=1)  # (batch, context, hidden)
        columns = torch.cat([earlier.to(columns), columns], dim=1)  # (batch, context, columns)
        positions = self.ledger.positions(columns)  # (batch, context), or (axes, batch, context)
        graph = self.settings["graph"]
        arguments = context_arguments(model, graph, states, real.long(), positions, columns[..., PICTURE])
        values = run_lane(model, graph, {name: states}, arguments, at + kept[0].shape[2])
        return next(values[node["name"]] for node in graph if node["op"] == "probe")

    def _gate(self, logits: Tensor, states: Tensor, keep: Any) -> Tensor:
        """The logits (batch, kept, vocabulary), forced where STATE (batch, tokens) says so."""
        refusal = tuple(self.settings["refusal_token_ids"])
        kept = keep.to(states.device) if isinstance(keep, Tensor) else slice(-keep if keep else None, None)
        states = states[:, kept].to(logits.device)  # (batch, kept)
        wanted = torch.tensor(refusal, device=logits.device)[(states - 1).clamp_min(0)]  # (batch, kept)
        return gate(logits, wanted, states > 0, refusal)

    def kept(self, cache: Cache | None) -> list[Tensor]:
        """The ledger of the tokens before, (batch, heads, past, size) each. ValueError where they were never judged."""
        past = 0 if cache is None else cache.get_seq_length()
        past = int(past) if isinstance(past, Tensor) else past  # in an exported graph it is a number
        if cache is None or past == 0:
            return []
        layers = cache.layers[self.ledger.first :]
        if len(layers) != self.ledger.layers:
            raise ValueError(
                "past_key_values holds tokens that this guarded model has not judged. Start from the whole prompt."
            )
        return [tensor[:, :, :past] for layer in layers for tensor in (layer.keys, layer.values)]

    def _keep(self, cache: Cache | None, columns: Tensor, projection: Tensor) -> None:
        """Write the call's tokens into the ledger's layers of the cache, which are added where they are missing."""
        if cache is None or not cache.layers:
            return
        like, ledger = cache.layers[0], self.ledger
        if len(cache.layers) == ledger.first:
            static = isinstance(like, StaticLayer)
            length = max(layer.get_max_length() for layer in cache.layers)
            cache.layers.extend(StaticLayer(length) if static else DynamicLayer() for _ in range(ledger.layers))
        packed = ledger.pack(columns.to(projection.device), projection, like.dtype)
        for index in range(ledger.layers):
            cache.update(packed[2 * index], packed[2 * index + 1], ledger.first + index)


def real_tokens(attention_mask: Any, context: int, like: Tensor) -> Tensor:
    """Which tokens of the context are no padding: (batch, context), bool, for the batch of `like`. The mask is (batch,
    context), or (batch, 1, tokens, keys) as static caches get it, one a type of layer."""
    mask = attention_mask
    if isinstance(mask, dict):  # that of the layers which attend to everything
        mask = mask.get("full_attention", next(iter(mask.values())))
    if not isinstance(mask, Tensor):
        return torch.ones((like.shape[0], context), dtype=torch.bool, device=like.device)
    if mask.dim() == 4:  # a real token is one that some token sees; bool, or 0 where seen and very negative elsewhere
        mask = (mask if mask.dtype == torch.bool else mask > -1.0).any(-2)[:, 0]
    if mask.shape[1] < context:
        raise ValueError(f"attention_mask has {mask.shape[1]} columns for {context} tokens. Pass one for each of them.")
    return (mask[:, :context] != 0).expand(like.shape[0], context)
