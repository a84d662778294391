"""When a verdict is due, and what follows from it.

**The rule.** A verdict is due at the end of a prompt: where the chat template's generation prompt is complete, however
it came in; or, in text without one, at the last token of a call that brings several, or of what `generate` was given.
It is read over the whole context, and holds until the next. A refused row emits the refusal token by token. Text that
begins with single tokens is judged at each of them, until a call brings several or a verdict refuses. A row without a
real token is refused. No row leaves the prompt of a `generate` without a verdict, or, where the caller has begun the
answer, an error or the verdict before that (`begun_answers`).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

# TURN of a token: no verdict before or at it; a verdict, but no open generation prompt; behind a generation prompt.
UNJUDGED, JUDGED, ANSWER = range(3)


class TemplateTokens(NamedTuple):
    """The template's and the refusal's tokens, numbered: token `table[i]` has the number i + 1, any other 0."""

    table: tuple[int, ...]
    turns: tuple[int, ...]  # a token of these ends an answer
    refusal: tuple[int, ...]
    generation_prompts: tuple[tuple[int, ...], ...]  # the default, and those of other settings of the template

    @classmethod
    def of(cls, sasa: dict[str, Any]) -> "TemplateTokens":
        prompts = [sasa["generation_prompt_ids"], *sasa.get("other_generation_prompt_ids", ())]
        lists = [sasa["turn_token_ids"], sasa["refusal_token_ids"], *prompts]
        table = sorted(set().union(*lists))
        number = {token: index + 1 for index, token in enumerate(table)}
        turns, refusal, *found = (tuple(number[token] for token in tokens) for tokens in lists)
        return cls(tuple(table), turns, refusal, tuple(found))

    def numbers(self, ids: Tensor | None, embeddings: Any, model: Any) -> Tensor:
        """The numbers (batch, tokens) of what came in: token ids, or the model's embeddings of them."""
        if ids is not None:
            return self.in_ids(ids)
        known = model.get_input_embeddings()(torch.tensor(self.table).to(embeddings.device))  # (numbers, hidden)
        return self.in_embeddings(embeddings, known)

    def in_ids(self, ids: Tensor) -> Tensor:
        """The numbers of token ids (batch, tokens)."""
        table = torch.tensor(self.table, device=ids.device)  # (numbers,)
        return ((ids[..., None] == table) * torch.arange(1, len(table) + 1, device=ids.device)).sum(-1)

    def in_embeddings(self, embeddings: Tensor, known: Tensor) -> Tensor:
        """The numbers of embeddings (batch, tokens, hidden), by the embeddings of the table (numbers, hidden)."""
        found, known = embeddings.float(), known.float()
        square = (known * known).sum(-1)  # (numbers,)
        apart = ((found * found).sum(-1, keepdim=True) - 2 * found @ known.T) / square + 1  # (batch, tokens, numbers)
        return torch.where(apart.amin(-1) <= 1e-3, apart.argmin(-1) + 1, 0)


class Call(NamedTuple):
    """What one call brings. By hand, `closes` is `several`; `generate` knows better where its prompt ends."""

    numbers: Tensor  # (batch, tokens)
    real: Tensor  # (batch, tokens), bool, False at padding
    earlier: Tensor  # (batch, count, 3), STATE, TURN and NUMBER of the tokens before, 0 where there are none
    several: Tensor  # (), bool: more than one token
    closes: Tensor  # (), bool: text without a generation prompt ends with this call
    prompt: Tensor | None = None  # (tokens,), bool: which tokens are the prompt's, where `generate` says so


class Due(NamedTuple):
    """The rows in which a verdict is due, and at which of the call's tokens."""

    rows: Tensor  # (batch,), bool
    at: Tensor  # (batch,), 0 where none is due
    answering: Tensor  # (batch,), bool: the call ends behind a generation prompt
    turned: Tensor  # (batch,), the token from which on TURN is what it is at the end of the call
    blind: Tensor  # (batch,), bool: a verdict is due, and there is no real token to read it at
    begun: Tensor  # (batch,), bool: `generate` was given text in a turn that the model would go on with


def find_due(call: Call, tokens: TemplateTokens) -> Due:
    """The rule above, row by row."""
    index = torch.arange(call.numbers.shape[1], device=call.numbers.device)  # (tokens,)
    before = call.earlier[:, -1, 1]  # (batch,), TURN
    prompt = call.real if call.prompt is None else call.real & call.prompt  # (batch, tokens)
    ending = (call.numbers[..., None] == torch.tensor(tokens.turns, device=index.device)).any(-1)  # (batch, tokens)
    ends = torch.stack([_ends_of(pattern, call) for pattern in tokens.generation_prompts]).any(0)  # (batch, tokens)
    opened = _last(ends & prompt, index)  # (batch,), -1 where there is none
    closed = _last(ending & prompt, index)  # (batch,)
    event = torch.maximum(opened, closed)  # (batch,)
    answering = ((event < 0) & (before == ANSWER)) | ((event >= 0) & (opened >= closed))  # (batch,)
    last = _last(prompt, index)  # (batch,)
    at = torch.where(answering, opened, last)  # (batch,)
    closes = call.closes | (before == UNJUDGED) if call.prompt is None else call.closes  # (batch,), or ()
    blind = (last < 0) & closes & (before == UNJUDGED if call.prompt is None else call.prompt.any())  # (batch,)
    begun = (answering & (last > opened)) | _in_open_turn(call, tokens, closed, opened)  # (batch,)
    begun = begun & closes & (call.prompt is not None)  # (batch,)
    rows = ((at >= 0) & (answering | closes)) | blind  # (batch,)
    return Due(rows, at.clamp_min(0), answering, torch.where(event < 0, at, event), blind, begun)


def _in_open_turn(call: Call, tokens: TemplateTokens, closed: Tensor, opened: Tensor) -> Tensor:
    """(batch,), bool: does the text end in a turn that the generation prompt's first token opens, and not all of it?"""
    first = next(iter(set(tokens.generation_prompts[0][:1]) & set(tokens.turns)), -1)
    return (closed > opened) & (call.numbers.gather(1, closed.clamp_min(0)[:, None])[:, 0] == first)


def follow(call: Call, due: Due, refused: Tensor, tokens: TemplateTokens) -> tuple[Tensor, Tensor]:
    """STATE and TURN of the call's tokens, (batch, tokens) each, given the verdicts `refused` (batch,), bool."""
    index = torch.arange(call.numbers.shape[1], device=call.numbers.device)  # (tokens,)
    state, turn = call.earlier[:, -1, 0], call.earlier[:, -1, 1]  # (batch,), of the token before
    rank = call.real.long().cumsum(-1)  # (batch, tokens), real tokens so far
    going_on = _count(call, state, rank, tokens)  # (batch, tokens)
    anew = _count(call, refused.long(), rank - rank.gather(1, due.at[:, None]), tokens)  # (batch, tokens)
    states = torch.where(due.rows[:, None] & (index >= due.at[:, None]), anew, going_on)  # (batch, tokens)
    settled = due.rows & (call.closes | refused) & (~due.blind | (call.prompt is not None))  # (batch,)
    lasting = (turn > UNJUDGED) | settled  # (batch,)
    after = torch.where(due.answering, ANSWER, torch.where(lasting, JUDGED, UNJUDGED))  # (batch,)
    return states, torch.where(index >= due.turned[:, None], after[:, None], turn[:, None])


def _count(call: Call, start: Tensor, behind: Tensor, tokens: TemplateTokens) -> Tensor:
    """STATE (batch, tokens) where it is `start` (batch,) at the token that `behind` (batch, tokens) counts from. A
    single token takes the refusal one further, whatever it is, since an option may have forbidden the wanted one; of
    several, as of drafts and prefilled answers, one that is not the refusal's begins it anew."""
    place = (start[:, None] + behind - 2).clamp(0, len(tokens.refusal) - 1)  # (batch, tokens)
    wanted = torch.tensor(tokens.refusal, device=behind.device)[place]  # (batch, tokens), numbers
    strays = call.real & (behind > 0) & (call.numbers != wanted) & call.several  # (batch, tokens)
    along = strays.long().cumsum(-1) == 0  # (batch, tokens)
    counted = (start[:, None] + behind.clamp_min(0)).clamp_max(len(tokens.refusal))  # (batch, tokens)
    return torch.where(start[:, None] > 0, torch.where(along, counted, 1), 0)


def _ends_of(pattern: tuple[int, ...], call: Call) -> Tensor:
    """(batch, tokens), bool: does the pattern of numbers end at this token?"""
    if not pattern:
        return torch.zeros_like(call.real)
    length, tokens = len(pattern) - 1, call.numbers.shape[1]
    row = torch.cat([call.earlier[:, call.earlier.shape[1] - length :, 2], call.numbers], dim=1)  # (batch, ...)
    found = call.real  # (batch, tokens)
    for place, number in enumerate(pattern):
        found = found & (row[:, place : place + tokens] == number)
    return found


def _last(flags: Tensor, index: Tensor) -> Tensor:
    """The last position (batch,) at which flags (batch, tokens) hold; -1 where none does."""
    return torch.where(flags, index, -1).amax(-1)
