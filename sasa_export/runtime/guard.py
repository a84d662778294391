"""What runs around the family's forward: ledger, verdict, second lane, probe and gate."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from sasa_export.runtime.formulas import gate, is_refused, unsafe_probability
from sasa_export.runtime.lane import context_arguments, project_taps, read_lane, run_lane
from sasa_export.runtime.ledger import PICTURE, Ledger
from sasa_export.runtime.settings import HOW_TO_LOAD
from sasa_export.runtime.verdict import Call, Due, TemplateTokens, find_due, follow
from sasa_export.runtime.watch import Recording

# Where the prompt that `generate` was given ends, in tokens; None for whoever calls the model by hand.
prompt_end: contextvars.ContextVar[int | None] = contextvars.ContextVar("prompt_end", default=None)


@contextlib.contextmanager
def generating(tokens: int | None) -> Iterator[None]:
    """Within this context, the first `tokens` that the model is fed are a prompt, and all others its answer."""
    token = prompt_end.set(tokens)
    try:
        yield
    finally:
        prompt_end.reset(token)


class Probe(nn.Module):
    """The linear probe: weight (features,) and bias (), float32 whatever the model is cast to."""

    def __init__(self, features: int) -> None:
        super().__init__()
        unset = float("nan")  # a probe that was never loaded must not pass for one
        self.weight = nn.Parameter(torch.full((features,), unset, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.full((), unset, dtype=torch.float32), requires_grad=False)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """P(unsafe), (...), of the lane's state (..., features)."""
        return unsafe_probability(state, self.weight.to(state.device), self.bias.to(state.device))

    def _apply(self, fn: Callable, recurse: bool = True) -> "Probe":
        before = {name: tensor.data for name, tensor in self.named_parameters()}
        super()._apply(fn, recurse)
        for name, tensor in self.named_parameters():
            if tensor.dtype != torch.float32:  # model.half() and the like move the probe, but do not round it
                tensor.data = before[name].to(tensor.device)
        return self

    def check(self) -> None:
        """Raise ValueError where the gate could not judge by it. One that is offloaded cannot be looked at here."""
        if self.weight.is_meta:
            return
        if not (torch.isfinite(self.weight).all() and torch.isfinite(self.bias) and self.weight.any()):
            raise ValueError(f"sasa.probe is zero, NaN or infinite, so the gate cannot judge. {HOW_TO_LOAD}")


class Guard(nn.Module):
    """The gate of a guarded model. `sasa` is config.sasa, and read at each call."""

    def __init__(self, sasa: dict[str, Any], ledger: Ledger, features: int) -> None:
        super().__init__()
        self.settings, self.ledger = sasa, ledger
        self.probe = Probe(features)

    def kept(self, cache: Cache | None) -> list[torch.Tensor]:
        """What the cache holds of the ledger, (batch, heads, past, size) each; nothing where it holds no tokens.

        ValueError where it holds tokens that were never judged.
        """
        past = 0 if cache is None else int_of(cache.get_seq_length())
        if cache is None or past == 0:
            return []
        layers = cache.layers[self.ledger.first :]
        if len(layers) != self.ledger.layers or any(int_of(layer.get_seq_length()) != past for layer in layers):
            raise ValueError(
                "past_key_values holds tokens that this guarded model has not judged. Start from the whole prompt "
                "without past_key_values."
            )
        return [tensor[:, :, :past] for layer in layers for tensor in (layer.keys, layer.values)]

    def forward(
        self, model: Any, kwargs: dict[str, Any], kept: list[torch.Tensor], seen: Recording, output: Any
    ) -> Any:
        """Judge what a call brought, keep it in the cache, and gate the logits of `output`.

        Args:
            model: the guarded model; kwargs: of its forward.
            kept: the ledger of the tokens before, as `kept` gives it; seen: the main lane's recording.
            output: what the family's forward returned, changed in place: `logits` are gated, and `unsafe_probability`
                (batch,), float32, is NaN where no verdict is due.
        """
        tokens = TemplateTokens.of(self.settings)
        projection = project_taps(self.settings["graph"], seen)  # (batch, tokens, hidden)
        kept = kept or self.ledger.empty(projection)
        fed = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        past = kept[0].shape[2]
        real = real_tokens(kwargs.get("attention_mask"), past + fed.shape[1], fed)  # (batch, context)
        symbols = self._symbols(model, fed, tokens)  # (batch, tokens)
        call = self._call(symbols, real, kept, tokens)
        due = find_due(call, tokens)
        columns = self._columns(symbols, kwargs, seen.position_ids, past)  # (batch, tokens, columns)

        probability = torch.full(symbols.shape[:1], float("nan"), device=symbols.device)  # (batch,)
        if torch.compiler.is_exporting() or due.rows.any():  # what an exported graph keeps in a branch
            probability = self._judge(model, due, projection, columns, real, kept).to(symbols.device)
        refused = due.rows & is_refused(probability, self.settings["threshold"])  # (batch,)
        states, turns = follow(call, due, refused, tokens)  # (batch, tokens)

        columns = torch.cat([states[..., None], turns[..., None], columns[..., 2:]], dim=-1)
        self._keep(output.past_key_values, columns, projection)
        output.logits = self._gate(output.logits, states, kwargs.get("logits_to_keep", 0))
        output["unsafe_probability"] = probability
        if torch.compiler.is_exporting():
            output["is_due"] = due.rows.any()
        return output

    def _symbols(self, model: Any, fed: torch.Tensor, tokens: TemplateTokens) -> torch.Tensor:
        """The template's tokens among ids (batch, tokens) or embeddings (batch, tokens, hidden)."""
        if fed.dim() == 2:
            return tokens.in_ids(fed)
        table = torch.tensor(tokens.table, device=fed.device)  # (symbols,)
        return tokens.in_embeddings(fed, model.get_input_embeddings()(table))

    def _call(
        self, symbols: torch.Tensor, real: torch.Tensor, kept: list[torch.Tensor], tokens: TemplateTokens
    ) -> Call:
        """What `find_due` wants to know."""
        past, count, end = kept[0].shape[2], symbols.shape[1], prompt_end.get()
        # Lengths as tensors: as numbers they would be frozen into an exported graph.
        several = torch.full((), count, device=symbols.device) != 1  # ()
        earlier = self.ledger.tail(kept, max(1, len(tokens.generation_prompt))).to(symbols)  # (batch, count, 3)
        if end is None:
            return Call(symbols, real[:, past:], earlier, several, several)
        prompt = torch.arange(past, past + count, device=symbols.device) < end  # (tokens,)
        closes = torch.tensor(past + count >= end, device=symbols.device)  # ()
        return Call(symbols, real[:, past:], earlier, several, closes, prompt)

    def _columns(self, symbols: torch.Tensor, kwargs: dict[str, Any], position_ids: Any, past: int) -> torch.Tensor:
        """The ledger's columns of the fed tokens, (batch, tokens, columns), int64; STATE and TURN are still 0."""
        batch, tokens = symbols.shape
        types = kwargs.get("token_type_ids")
        types = torch.zeros_like(symbols) if types is None else types[:, -tokens:].to(symbols)  # (batch, tokens)
        if position_ids is None:
            position_ids = torch.arange(past, past + tokens, device=symbols.device)[None]  # (1, tokens)
        if position_ids.dim() == 2:
            position_ids = position_ids[None]  # (1, batch, tokens)
        axes = self.ledger.axes
        positions = position_ids[-axes:].expand(axes, batch, tokens).to(symbols.device)
        unset = torch.zeros_like(symbols)
        parts = torch.stack([unset, unset, symbols, types], dim=-1)  # (batch, tokens, 4)
        return torch.cat([parts, self.ledger.digits(positions).to(symbols)], dim=-1)

    def _judge(
        self,
        model: Any,
        due: Due,
        projection: torch.Tensor,
        columns: torch.Tensor,
        real: torch.Tensor,
        kept: list[torch.Tensor],
    ) -> torch.Tensor:
        """P(unsafe) where a verdict is due, (batch,), by the second lane over the whole context; NaN in other rows."""
        graph, past = self.settings["graph"], kept[0].shape[2]
        states = torch.cat([self.ledger.unpack_projection(kept).to(projection), projection], dim=1)
        columns = torch.cat([self.ledger.unpack_columns(kept).to(columns), columns], dim=1)
        positions, types = self.ledger.positions(columns), columns[..., PICTURE]
        arguments = context_arguments(model.model, states, real.long(), positions, types)
        values = run_lane(model, graph, states, arguments)  # (batch, context, hidden) each
        found = read_lane(model, graph, values, due.at + past)
        probability = next(found[node["name"]] for node in graph if node["op"] == "probe")  # (batch,)
        return probability.masked_fill(~due.rows.to(probability.device), float("nan"))

    def _gate(self, logits: torch.Tensor, states: torch.Tensor, keep: Any) -> torch.Tensor:
        """The logits (batch, kept, vocabulary), forced where STATE (batch, tokens) says so."""
        refusal = tuple(self.settings["refusal_token_ids"])
        if isinstance(keep, torch.Tensor):
            states = states[:, keep.to(states.device)]
        elif keep:
            states = states[:, -keep:]
        states = states.to(logits.device)  # (batch, kept)
        wanted = torch.tensor(refusal, device=logits.device)[(states - 1).clamp_min(0)]  # (batch, kept)
        return gate(logits, wanted, states > 0, refusal)

    def _keep(self, cache: Cache | None, columns: torch.Tensor, projection: torch.Tensor) -> None:
        """Write the fed tokens into the ledger's layers of the cache, which are added where they are missing."""
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


def real_tokens(attention_mask: Any, context: int, fed: torch.Tensor) -> torch.Tensor:
    """Which tokens of the context are no padding: (batch, context), bool.

    The mask is (batch, context), or (batch, 1, tokens, keys) as static caches get it, one a type of layer. ValueError
    where it has fewer columns than the context has tokens.
    """
    mask = attention_mask
    if isinstance(mask, dict):  # that of the layers which attend to everything
        mask = mask.get("full_attention", next(iter(mask.values())))
    if not isinstance(mask, torch.Tensor):
        return torch.ones((fed.shape[0], context), dtype=torch.bool, device=fed.device)
    if mask.dim() == 4:  # a real token is one that some token sees; bool, or 0 where seen and very negative elsewhere
        mask = (mask if mask.dtype == torch.bool else mask > -1.0).any(-2)[:, 0]
    if mask.shape[1] < context:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns for {context} tokens, those of past_key_values among them. "
            "Pass one column for each."
        )
    return (mask[:, :context] != 0).expand(fed.shape[0], context)


def last_real(real: torch.Tensor) -> torch.Tensor:
    """The position (batch,) of each row's last real token, under any padding; real: (batch, tokens), bool."""
    return torch.where(real, torch.arange(real.shape[1], device=real.device), 0).amax(-1)


def int_of(length: Any) -> Any:
    """A length as a number; in an exported graph it stays a symbol."""
    return int(length) if isinstance(length, torch.Tensor) else length
