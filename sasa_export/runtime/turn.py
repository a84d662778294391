"""Where a prompt ends.

A prompt ends where the chat template's generation prompt is complete, however it came in; what follows is the
answer, until another turn begins. Text without one is a prompt to the end of each call that brings several tokens,
and, as long as none did, of each that brings one.
"""

from dataclasses import dataclass
from typing import Any

import torch

from sasa_export.runtime.ledger import JUDGED
from sasa_export.runtime.words import Words, ends_of, last_place, spelled_at_the_end


@dataclass(frozen=True)
class Turn:
    """What one call brings, row by row."""

    judged: torch.Tensor  # (batch,), the position in the context whose state the probe reads
    due: torch.Tensor  # (batch,), bool: a verdict is due in this call
    refused_states: torch.Tensor  # (batch, tokens), STATE of the fed tokens where the verdict is to refuse
    other_states: torch.Tensor  # (batch, tokens), STATE of the fed tokens where no verdict is due
    covered: torch.Tensor  # (batch, tokens), bool: a verdict covers the fed token
    answer: torch.Tensor  # (batch, tokens), bool: real tokens that no verdict on the prompt is about
    rank: torch.Tensor  # (batch, tokens), real tokens so far

    def states(self, refused: torch.Tensor) -> torch.Tensor:
        """STATE of the fed tokens, (batch, tokens), when `refused` (batch,) are the verdicts."""
        judged = self.refused_states * refused[:, None]
        return torch.where(self.due[:, None], judged, self.other_states)

    def late_states(self, states: torch.Tensor, unsafe: torch.Tensor, longest: int) -> torch.Tensor:
        """`states`, and a refusal from the first answer token on that is unsafe, (batch, tokens) bool."""
        turned = (unsafe & self.answer & (states == 0)).long().cumsum(-1) > 0  # (batch, tokens)
        begun = torch.where(turned, self.rank, self.rank[:, -1:] + 1).amin(-1, keepdim=True)  # (batch, 1)
        late = (self.rank - begun + 1).clamp(0, longest)  # (batch, tokens)
        return torch.where(turned & (states == 0), late, states)


def read_turn(
    symbols: torch.Tensor,
    real: torch.Tensor,
    past: Any,
    several: Any,
    before: torch.Tensor,
    covered: torch.Tensor,
    words: Words,
    prompt_end: int | None = None,
) -> Turn:
    """Find where the prompt of each row ends, and whether this call completes it.

    Args:
        symbols: (batch, context), of the whole context; real: the same shape, False at padding.
        past: the number of tokens that the cache held before this call.
        several: is this the first call, or one of several tokens? A bool, or () bool.
        before: (batch,), STATE before this call.
        covered: (batch, context), bool, JUDGED of the context; False at the fed tokens.
        prompt_end: where the prompt ends for whoever knows it, as `generate` does; no verdict is due behind it.
    """
    index = torch.arange(symbols.shape[1], device=symbols.device)  # (context,)
    rank = real.long().cumsum(-1)  # (batch, context), real tokens so far
    prompt = real if prompt_end is None else real & (index < prompt_end)
    last = last_place(prompt, index)  # (batch,)
    opened = last_place(ends_of(words.generation_prompt, symbols, real, rank) & prompt, index, -1)  # (batch,)
    turned = (symbols[..., None] == torch.tensor(words.turns, device=symbols.device)).any(-1)  # (batch, context)
    answering = (opened >= 0) & ~(turned & prompt & (index > opened[:, None])).any(-1)  # (batch,)
    judged = torch.where(answering, opened, last)  # (batch,)
    # Due is a verdict on a prompt that ends in this call, and on one in the cache that has none yet, as whoever crops a
    # conversation back behind an earlier prompt will find.
    known = covered.gather(1, judged[:, None])[:, 0]  # (batch,)
    inherited = (covered & (index == past - 1)).any(-1)  # (batch,)
    closed = several | ~inherited if prompt_end is None else symbols.shape[1] >= prompt_end
    brings = (real & (index >= past)).sum(-1)  # (batch,), real tokens of this call
    due = (brings > 0) & ((judged >= past) | ~known) & (answering | closed)
    lasts = answering | (brings > 1) | (prompt_end is not None)  # (batch,), the verdict, beyond this call

    new = index[past:]  # (tokens,)
    follows = before[:, None] + (rank[:, past:] - rank[:, past:][:, :1] + real[:, past:].long()[:, :1])
    behind = rank[:, past:] - rank.gather(1, judged[:, None])  # (batch, tokens), real tokens behind the judged one
    refusal = torch.tensor(words.refusal, device=symbols.device)
    wanted = refusal[(behind - 1).clamp(0, len(words.refusal) - 1)]  # (batch, tokens)
    strays = (behind > 0) & real[:, past:] & (symbols[:, past:] != wanted)  # (batch, tokens)
    along = strays.long().cumsum(-1) == 0  # (batch, tokens): nothing but the refusal stands behind the prompt
    spelled = torch.where(along, behind.clamp_min(0), 0)  # (batch, tokens)
    end = last_place(real, index)  # (batch,)
    if prompt_end is None:  # text that comes a token at a time, and now the word that was forced
        forced = symbols.gather(1, end[:, None])[:, 0] == refusal[(before - 1).clamp_min(0)]  # (batch,)
        due = due & ~(forced & (before > 0) & ~lasts & ~torch.as_tensor(several, device=due.device))
    restarted = spelled_at_the_end(words.refusal, symbols, real, rank, judged)  # (batch,)
    spelled = torch.where(new >= end[:, None], restarted[:, None], spelled)
    states = (spelled + 1).clamp_max(len(words.refusal)) * (new >= judged[:, None])  # (batch, tokens)
    # A refusal under way goes on with each token, and begins anew behind an answer that its prompt still brings.
    still = several if prompt_end is None else symbols.shape[1] <= prompt_end
    follows = torch.where((new >= end[:, None]) & still, restarted[:, None] + 1, follows)
    other_states = torch.where(before[:, None] > 0, follows.clamp_max(len(words.refusal)), 0)  # (batch, tokens)
    answer = real[:, past:] & ((new > judged[:, None]) | ~due[:, None])  # (batch, tokens)
    reached = ((due & lasts)[:, None] & (new >= judged[:, None])) | (~due & inherited)[:, None]  # (batch, tokens)
    return Turn(judged, due, states, other_states, reached, answer, rank[:, past:])


def goes_on(last: torch.Tensor, symbols: torch.Tensor, words: Words) -> torch.Tensor:
    """Rows (batch,) in which one more token is an answer's for sure, so that `read_turn` has nothing to find.

    A verdict covers the token before it, and no generation prompt ends in it.

    Args:
        last: (batch, columns), the ledger of the token before; symbols: (batch, 1).
    """
    covered = last[:, JUDGED] > 0
    return covered & (symbols[:, 0] != words.generation_prompt[-1]) if words.generation_prompt else covered


def states_going_on(before: torch.Tensor, real: torch.Tensor, words: Words) -> torch.Tensor:
    """STATE (batch, tokens) of a token that goes on with an answer or a refusal.

    Args: before (batch,), STATE of the token before; real (batch, tokens), bool.
    """
    following = (before[:, None] + real.long()).clamp_max(len(words.refusal))  # (batch, tokens)
    return torch.where(before[:, None] > 0, following, 0)


def earlier_answers(
    symbols: torch.Tensor, real: torch.Tensor, past: int, judged: torch.Tensor, words: Words
) -> torch.Tensor:
    """Where the fed tokens hold answers of earlier turns: (batch, tokens).

    That is the position among the fed tokens of the generation prompt which a token answers, or -1.
    """
    index = torch.arange(symbols.shape[1], device=symbols.device)  # (context,)
    ends = ends_of(words.generation_prompt, symbols, real, real.long().cumsum(-1))  # (batch, context)
    turned = (symbols[..., None] == torch.tensor(words.turns, device=symbols.device)).any(-1) & real
    opened = torch.where(ends, index, -1).cummax(-1).values  # (batch, context)
    closed = torch.where(turned, index, -1).cummax(-1).values  # (batch, context)
    found = torch.where((opened >= past) & (closed <= opened) & (index < judged[:, None]), opened - past, -1)
    return found[:, past:]
