"""One call of a guarded model: what is fed, whether a verdict is due on it, and what the gate makes of the logits."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from sasa_export.runtime.formulas import gate
from sasa_export.runtime.generation import current_generation
from sasa_export.runtime.lane import context_arguments, project_taps, run_lane, run_probe, run_probe_at
from sasa_export.runtime.ledger import JUDGED, REAL, STATE, SYMBOL, Ledger
from sasa_export.runtime.live_lane import LiveLane
from sasa_export.runtime.mask import check_mask, is_sound, real_tokens
from sasa_export.runtime.nodes import EVERY_TOKEN, PROMPT, graph_ends, lane_layers
from sasa_export.runtime.turn import Turn, earlier_answers, goes_on, read_turn, states_going_on
from sasa_export.runtime.watch import Recording, recording
from sasa_export.runtime.words import Words

PACKED = "prompts packed into one row cannot be judged one by one. Run without it."


class Judging:
    """The forward of a guarded model: the family's own, with ledger, second lane, probe and gate around it."""

    def _sasa_forward(self, forward: Callable, kwargs: dict[str, Any]) -> Any:
        as_dictionary = kwargs.pop("return_dict", None)
        if as_dictionary is None:
            as_dictionary = self.config.return_dict
        ids, embeddings = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        fed = ids if ids is not None else embeddings  # (batch, tokens[, hidden])
        if fed is None:
            return forward(self, **kwargs)  # the family's own error says what is missing
        if "paged" in str(self.config._attn_implementation) or kwargs.get("cu_seq_lens_q") is not None:
            raise NotImplementedError(f"packed prompts: {PACKED}")
        sasa = self.config.sasa
        ledger, words = Ledger.of(self.config.get_text_config(decoder=True), sasa), Words.of(sasa)
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        kept, lane_layers = self._kept(cache, past, ledger)
        generation = current_generation.get()
        own, prompt_end = generation is not None, None
        if generation is not None and generation.cache is cache:
            prompt_end = generation.prompt_end
        shown = ledger.unpack(kept, REAL, REAL + 1)[..., 0] > 0.5 if kept else fed.new_zeros((len(fed), 0)).bool()
        check_mask(kwargs.get("attention_mask"), shown, fed.shape[1], fed, own=own)
        known = None if ids is not None else self.get_input_embeddings()(_on(words.table, fed))
        symbols = words.in_ids(ids) if known is None else words.in_embeddings(embeddings, known)  # (batch, tokens)
        last = ledger.unpack_columns([tensor[:, :, -1:] for tensor in kept])[:, 0] if kept else None  # (batch, columns)
        is_answer = sasa["gate"] == PROMPT and fed.shape[1] == 1 and (prompt_end is None or past >= prompt_end)
        is_answer = is_answer and last is not None and bool(goes_on(last, symbols, words).all())

        lane = LiveLane(self, sasa["graph"], lane_layers) if sasa["gate"] == EVERY_TOKEN else None
        with recording(lane=lane) as seen:
            output = forward(self, **kwargs, return_dict=True)
        columns = read_columns(kwargs, past, fed, symbols, seen.position_ids, ledger)
        before = torch.zeros_like(columns[:, 0, STATE]) if last is None else last[:, STATE]  # (batch,)
        projection = project_taps(sasa["graph"], seen)  # (batch, tokens, hidden)
        real = columns[..., REAL] > 0  # (batch, tokens)
        covered, nothing = torch.ones_like(real), torch.zeros_like(real[:, :1])
        probability, states = None, states_going_on(before, real, words)  # (batch, tokens)
        if not is_answer:
            context = torch.cat([ledger.unpack_columns(kept), columns], dim=1) if kept else columns
            turn = read_turn(
                context[..., SYMBOL], context[..., REAL] > 0, past, past == 0 or fed.shape[1] > 1, before,
                context[..., JUDGED] > 0, words, prompt_end,
            )  # fmt: skip
            if lane is None:
                probability, states = self._judge(turn, projection, kept, seen, context, ledger)
            else:
                probability, states = self._judge_all(turn, lane, past)
            # A row of padding alone has no prompt to judge, and attention over no key is attention over all.
            covered, nothing = turn.covered, turn.rank[:, -1:] == 0
        states = torch.where(is_sound(projection, real), states, states.clamp_min(1))  # (batch, tokens)

        columns[..., STATE], columns[..., JUDGED] = states, covered
        if output.past_key_values is not None and output.past_key_values.get_seq_length():
            self._keep(output.past_key_values, ledger, columns, projection, lane)
        said = torch.where(nothing, states.clamp_min(1), states)  # (batch, tokens)
        output.logits = self._gate(output.logits, said, kwargs.get("logits_to_keep", 0))
        output["unsafe_probability"] = probability
        return output if as_dictionary else output.to_tuple()

    def _judge(
        self,
        turn: Turn,
        projection: torch.Tensor,
        kept: list[torch.Tensor],
        seen: Recording,
        context: torch.Tensor,
        ledger: Ledger,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """P(unsafe) where a verdict on a prompt is due, (batch,), NaN in other rows, and STATE (batch, tokens)."""
        if not turn.due.any():
            return None, turn.other_states
        whole, arguments = projection, seen.arguments  # (batch, context, hidden)
        real = context[..., REAL] > 0  # (batch, context)
        if kept:
            whole = torch.cat([ledger.unpack_projection(kept).to(projection), projection], dim=1)
            arguments = context_arguments(self.model, whole, real, context, ledger)
        graph, words = self.config.sasa["graph"], Words.of(self.config.sasa)
        values = run_lane(self, graph, whole, arguments, turn.judged, real)
        probability = self._read(values)  # (batch,)
        states = turn.states(self._unsafe(probability).to(turn.due.device))
        past = context.shape[1] - projection.shape[1]
        earlier = earlier_answers(context[..., SYMBOL], real, past, turn.judged, words)
        if (earlier >= 0).any():  # a conversation in one call: the logits of its earlier answers are judged too
            fed = torch.arange(past, context.shape[1], device=real.device).expand_as(earlier)  # (batch, tokens)
            found = self._read(run_probe_at(self, graph, values, fed, real))  # (batch, tokens)
            unsafe = self._unsafe(found).to(earlier.device)  # (batch, tokens)
            states = torch.where((earlier >= 0) & unsafe.gather(1, earlier.clamp_min(0)), 1, states)
        return probability.masked_fill(~turn.due.to(probability.device), float("nan")), states

    def _judge_all(self, turn: Turn, lane: LiveLane, past: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The largest P(unsafe) among the positions that this call judges, (batch,), and STATE (batch, tokens)."""
        graph = self.config.sasa["graph"]
        ends = dict.fromkeys(graph_ends(graph), lane.state)
        found = self._read(run_probe(self, graph, ends)).to(turn.due.device)  # (batch, tokens)
        unsafe = self._unsafe(found)  # (batch, tokens)
        turn = replace(turn, due=turn.due & (turn.judged >= past))  # earlier tokens had theirs
        place = (turn.judged - past).clamp_min(0)[:, None]  # (batch, 1)
        states = turn.states(unsafe.gather(1, place)[:, 0])
        states = turn.late_states(states, unsafe, len(self.config.sasa["refusal_token_ids"]))
        here = torch.zeros_like(unsafe).scatter(1, place, turn.due[:, None]) | turn.answer  # (batch, tokens)
        largest = found.masked_fill(~here, -1.0).amax(-1)  # (batch,); NaN stays NaN
        return largest.masked_fill(~here.any(-1), float("nan")), states

    def _read(self, values: dict[str, torch.Tensor]) -> torch.Tensor:
        """P(unsafe), (...), among the values of the graph."""
        return next(values[node["name"]] for node in self.config.sasa["graph"] if node["op"] == "probe")

    def _unsafe(self, probability: torch.Tensor) -> torch.Tensor:
        """The verdicts, (...), bool; NaN is unsafe."""
        return ~(probability < self.config.sasa["threshold"])

    def _gate(self, logits: torch.Tensor, states: torch.Tensor, keep: Any) -> torch.Tensor:
        """The logits (batch, kept, vocabulary), forced where STATE (batch, tokens) says so."""
        refusal = tuple(self.config.sasa["refusal_token_ids"])
        kept = torch.arange(states.shape[1], device=states.device)  # (kept,)
        kept = kept[keep.to(kept.device)] if isinstance(keep, torch.Tensor) else kept[-keep:] if keep else kept
        states = states[:, kept].to(logits.device)  # (batch, kept)
        due = _on(refusal, logits)[(states - 1).clamp_min(0)]  # (batch, kept)
        return gate(logits, due, states > 0, refusal)

    def _keep(
        self, cache: Cache, ledger: Ledger, columns: torch.Tensor, projection: torch.Tensor, lane: LiveLane | None
    ) -> None:
        """Write the fed tokens into the ledger, and put the lane's own cache layers behind it."""
        first = cache.layers[0]
        if len(cache.layers) == ledger.first:
            static = isinstance(first, StaticLayer)
            length = max(layer.get_max_length() for layer in cache.layers)
            cache.layers.extend(StaticLayer(length) if static else DynamicLayer() for _ in range(ledger.layers))
        packed = ledger.pack(columns.to(projection.device), projection[..., : ledger.hidden], first.dtype)
        for index in range(ledger.layers):
            cache.update(packed[2 * index], packed[2 * index + 1], ledger.first + index)
        if lane is not None and len(cache.layers) == ledger.first + ledger.layers:
            cache.layers.extend(lane.layers[path] for path in lane.paths)

    def _kept(self, cache: Cache | None, past: int, ledger: Ledger) -> tuple[list[torch.Tensor], list[Any]]:
        """What the cache holds of the tokens before this call; nothing where there are none.

        Returns the ledger, tensors (batch, heads, past, size), and the lane's own cache layers.
        """
        if cache is None or past == 0:
            return [], []
        end, sasa = ledger.first + ledger.layers, self.config.sasa
        own = lane_layers(sasa)
        layers = cache.layers[ledger.first :]
        if len(cache.layers) != end + own or any(int(layer.get_seq_length()) != past for layer in layers):
            raise ValueError(
                "past_key_values holds tokens that this guarded model has not judged. Start from the whole prompt "
                "without past_key_values."
            )
        kept = [
            tensor[:, :, :past] for layer in cache.layers[ledger.first : end] for tensor in (layer.keys, layer.values)
        ]
        return kept, cache.layers[end:]


def read_columns(
    kwargs: dict[str, Any],
    past: int,
    fed: torch.Tensor,
    symbols: torch.Tensor,
    position_ids: torch.Tensor | None,
    ledger: Ledger,
) -> torch.Tensor:
    """The ledger's columns of the fed tokens, (batch, tokens, columns), int64; STATE and JUDGED are still 0.

    Args:
        kwargs: of the model's forward; fed: the ids or embeddings among them.
        symbols: (batch, tokens); position_ids: as the decoder got them, with one axis or several.
    """
    batch, tokens = fed.shape[:2]
    real = real_tokens(kwargs.get("attention_mask"), past, tokens, fed)  # (batch, tokens)
    picture = kwargs.get("token_type_ids")
    picture = torch.zeros_like(symbols) if picture is None else picture[:, -tokens:].to(symbols)  # (batch, tokens)
    if position_ids is None:
        position_ids = torch.arange(past, past + tokens, device=fed.device)[None]  # (1, tokens)
    if position_ids.dim() == 2:
        position_ids = position_ids[None]  # (1, batch, tokens)
    positions = position_ids[-ledger.axes :].expand(ledger.axes, batch, tokens).clamp_min(0)
    unset = torch.zeros_like(symbols)
    parts = [unset, symbols, real.to(symbols), picture, unset]
    return torch.cat([torch.stack(parts, dim=-1), ledger.digits(positions).to(symbols)], dim=-1)


def _on(tokens: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(tokens, device=like.device)
