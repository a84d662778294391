"""When a verdict is due, and which tokens follow from it.

**The rule.** A verdict is due where a prompt ends: where the chat template's generation prompt is complete, in one
call or several. Text without one ends with a call of several tokens, or with the input of `generate`. Text that
begins with single tokens is judged at each of them, until a call brings several or a verdict refuses. A verdict reads
the whole context and holds until the next. A refused row emits the refusal token by token. A row without a real token
is refused. In `generate`, every row leaves the prompt with a verdict. If the prompt begins the answer, the row gets
an error, or only the verdict before the answer (`begun_answers`).
"""

import functools
import operator
from typing import Any, NamedTuple

from sasa_export.runtime.arrays import Array, clipped, constant, greater, indices, joined, largest, where

# TURN of a token: no verdict so far; a verdict, but no open generation prompt; behind a generation prompt.
UNJUDGED, JUDGED, ANSWER = range(3)


class TemplateTokens(NamedTuple):
    """The template's and the refusal's tokens as numbers: token id `table[i]` has the number i + 1, any other 0."""

    table: tuple[int, ...]
    turns: tuple[int, ...]  # numbers of the tokens that end an answer
    refusal: tuple[int, ...]
    generation_prompts: tuple[tuple[int, ...], ...]  # the default, then those of other template settings

    @classmethod
    def of(cls, sasa: dict[str, Any]) -> "TemplateTokens":
        prompts = [sasa["generation_prompt_ids"], *sasa.get("other_generation_prompt_ids", ())]
        lists = [sasa["turn_token_ids"], sasa["refusal_token_ids"], *prompts]
        table = sorted(set().union(*lists))
        number = {token: index + 1 for index, token in enumerate(table)}
        turns, refusal, *found = (tuple(number[token] for token in tokens) for tokens in lists)
        return cls(tuple(table), turns, refusal, tuple(found))

    def in_ids(self, ids: Array) -> Array:
        """Return the numbers (batch, tokens) of token ids (batch, tokens)."""
        found = ids[..., None] == constant(self.table, ids)  # (batch, tokens, numbers)
        return (found * (indices(len(self.table), ids) + 1)).sum(-1)


class Call(NamedTuple):
    """The tokens of one call. In a direct call `closes` equals `several`; `generate` knows where its prompt ends."""

    numbers: Array  # (batch, tokens)
    real: Array  # (batch, tokens), bool, False at padding
    earlier: Array  # (batch, count, 3), STATE, TURN and NUMBER of earlier tokens, 0 for missing ones
    several: Array  # (), bool: more than one token
    closes: Array  # (), bool: text without a generation prompt ends with this call
    prompt: Array | None = None  # (tokens,), bool: tokens of the prompt; None in a direct call


class Due(NamedTuple):
    """The rows in which a verdict is due, and the token of the call that is judged in each."""

    rows: Array  # (batch,), bool
    at: Array  # (batch,), the judged token; of no effect in rows without a verdict
    answering: Array  # (batch,), bool: the call ends behind a generation prompt
    turned: Array  # (batch,), from this token on, TURN is that of the call's end
    blind: Array  # (batch,), bool: a verdict is due, but no real token can be judged
    begun: Array  # (batch,), bool: the prompt of `generate` begins the answer, or leaves a turn open


def find_due(call: Call, tokens: TemplateTokens) -> Due:
    """Apply the rule above to each row."""
    index = indices(call.numbers.shape[1], call.numbers)  # (tokens,)
    before = call.earlier[:, -1, 1]  # (batch,), TURN
    prompt = call.real if call.prompt is None else call.real & call.prompt  # (batch, tokens)
    ending = (call.numbers[..., None] == constant(tokens.turns, index)).any(-1)  # (batch, tokens)
    patterns = (_ends_of(pattern, call) for pattern in tokens.generation_prompts)  # (batch, tokens) each
    ends = functools.reduce(operator.or_, patterns)  # (batch, tokens)
    opened = _last(ends & prompt, index)  # (batch,), -1 where there is none
    closed = _last(ending & prompt, index)  # (batch,)
    event = greater(opened, closed)  # (batch,)
    answering = ((event < 0) & (before == ANSWER)) | ((event >= 0) & (opened >= closed))  # (batch,)
    last = _last(prompt, index)  # (batch,)
    at = where(answering, opened, last)  # (batch,)
    closes = call.closes | (before == UNJUDGED) if call.prompt is None else call.closes  # (batch,), or ()
    blind = (last < 0) & closes & (before == UNJUDGED if call.prompt is None else call.prompt.any())  # (batch,)
    begun = (answering & (last > opened)) | _in_open_turn(call, tokens, closed, opened)  # (batch,)
    begun = begun & closes & (call.prompt is not None)  # (batch,)
    rows = ((at >= 0) & (answering | closes)) | blind  # (batch,)
    return Due(rows, clipped(at, 0, None), answering, where(event < 0, at, event), blind, begun)


def _in_open_turn(call: Call, tokens: TemplateTokens, closed: Array, opened: Array) -> Array:
    """Return (batch,), bool: the last turn opens with the default generation prompt's first token, not its others."""
    first = next(iter(set(tokens.generation_prompts[0][:1]) & set(tokens.turns)), -1)
    index = indices(call.numbers.shape[1], call.numbers)  # (tokens,)
    return (closed > opened) & ((index == closed[:, None]) & (call.numbers == first)).any(-1)


def follow(call: Call, due: Due, refused: Array, tokens: TemplateTokens) -> tuple[Array, Array]:
    """Return STATE and TURN of the call's tokens, (batch, tokens) each, after the verdicts `refused` (batch,), bool."""
    index = indices(call.numbers.shape[1], call.numbers)  # (tokens,)
    state, turn = call.earlier[:, -1, 0], call.earlier[:, -1, 1]  # (batch,), of the token before
    rank = (call.real * 1).cumsum(-1)  # (batch, tokens), real tokens so far
    ahead = (rank * (index == due.at[:, None])).sum(-1)  # (batch,), real tokens up to the judged one
    going_on = _count(call, state, rank, tokens)  # (batch, tokens)
    anew = _count(call, refused * 1, rank - ahead[:, None], tokens)  # (batch, tokens)
    states = where(due.rows[:, None] & (index >= due.at[:, None]), anew, going_on)  # (batch, tokens)
    settled = due.rows & (call.closes | refused) & (~due.blind | (call.prompt is not None))  # (batch,)
    lasting = (turn > UNJUDGED) | settled  # (batch,)
    after = where(due.answering, ANSWER, where(lasting, JUDGED, UNJUDGED))  # (batch,)
    return states, where(index >= due.turned[:, None], after[:, None], turn[:, None])


def _count(call: Call, start: Array, behind: Array, tokens: TemplateTokens) -> Array:
    """Return STATE (batch, tokens): `start` (batch,) at the token from which `behind` (batch, tokens) counts real
    tokens. A call of one token always advances the refusal, since an option may have forbidden the wanted token. In a
    call of several, such as drafts or prefilled answers, a wrong token restarts it."""
    place = clipped(start[:, None] + behind - 2, 0, len(tokens.refusal) - 1)  # (batch, tokens)
    wanted = constant(tokens.refusal, behind)[place]  # (batch, tokens), numbers
    strays = call.real & (behind > 0) & (call.numbers != wanted) & call.several  # (batch, tokens)
    along = (strays * 1).cumsum(-1) == 0  # (batch, tokens)
    counted = clipped(start[:, None] + clipped(behind, 0, None), 0, len(tokens.refusal))  # (batch, tokens)
    return where(start[:, None] > 0, where(along, counted, 1), 0)


def _ends_of(pattern: tuple[int, ...], call: Call) -> Array:
    """Return whether the pattern of numbers ends at each token, (batch, tokens), bool."""
    if not pattern:
        return call.real & ~call.real
    length, tokens = len(pattern) - 1, call.numbers.shape[1]
    row = joined([call.earlier[:, call.earlier.shape[1] - length :, 2], call.numbers])  # (batch, ...)
    found = call.real  # (batch, tokens)
    for place, number in enumerate(pattern):
        found = found & (row[:, place : place + tokens] == number)
    return found


def _last(flags: Array, index: Array) -> Array:
    """Return the last position (batch,) where flags (batch, tokens) hold, or -1 where none does."""
    return largest(where(flags, index, -1))


def last_tokens(real: Array, at: Array, count: int) -> tuple[Array, Array, Array]:
    """Return the last `count` real tokens of each row up to `at` (batch,): their index in the context, (batch, count),
    the place of the last among them, (batch,), and which of them exist, (batch, count), bool. Rows with fewer repeat
    their last one. `real` is (batch, context)."""
    index = indices(real.shape[1], real)  # (context,)
    kept = real & (index <= at[:, None])  # (batch, context)
    rank = (kept * 1).cumsum(-1)  # (batch, context), real tokens so far
    last = rank[:, -1:]  # (batch, 1), how many there are
    wanted = clipped(last - count, 0, None) + indices(count, real) + 1  # (batch, count)
    place = where(wanted <= last, wanted, last)  # (batch, count)
    found = kept[:, None] & (rank[:, None] == place[..., None])  # (batch, count, context)
    return (found * index).sum(-1), clipped(last[:, 0], 1, count) - 1, wanted <= last
