"""The tokens that the gate knows, and where they stand in a context."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Words:
    """The tokens that the gate knows, as symbols: token `table[i]` is i + 1, any other is 0."""

    table: tuple[int, ...]
    generation_prompt: tuple[int, ...]
    turns: tuple[int, ...]  # a token of these ends an answer
    refusal: tuple[int, ...]

    @classmethod
    def of(cls, sasa: dict[str, Any]) -> "Words":
        """The words of config.sasa."""
        lists = [sasa["generation_prompt_ids"], sasa["turn_token_ids"], sasa["refusal_token_ids"]]
        table = sorted(set().union(*lists))
        symbol = {token: index + 1 for index, token in enumerate(table)}
        return cls(tuple(table), *(tuple(symbol[token] for token in tokens) for tokens in lists))

    def in_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """The symbols of token ids (batch, tokens)."""
        table = torch.tensor(self.table, device=ids.device)  # (symbols,)
        order = torch.arange(1, len(self.table) + 1, device=ids.device)  # (symbols,)
        return ((ids[..., None] == table) * order).sum(-1)

    def in_embeddings(self, embeddings: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """The symbols of embeddings (batch, tokens, hidden), by the embeddings of the table (symbols, hidden)."""
        found, known = embeddings.float(), known.float()
        square = (known * known).sum(-1)  # (symbols,)
        apart = (found * found).sum(-1, keepdim=True) - 2 * found @ known.T + square  # (batch, tokens, symbols)
        apart = apart / square  # (batch, tokens, symbols), relative
        return torch.where(apart.amin(-1) <= 1e-3, apart.argmin(-1) + 1, 0)


def last_places(real: torch.Tensor, judged: torch.Tensor, count: int) -> torch.Tensor:
    """The last `count` real tokens up to each judged position, latest first; -1 where there are no more.

    Args: real (batch, context), bool; judged (batch, verdicts). Returns (batch, verdicts, count).
    """
    rank = real.long().cumsum(-1)  # (batch, context), real tokens so far
    index = torch.arange(1, real.shape[1] + 1, device=real.device).expand_as(rank)  # (batch, context), from 1 on
    place = _compact(index, real, rank) - 1  # (batch, 1 + context), of the token with each rank; -1 of rank 0
    back = torch.arange(count, device=real.device)  # (count,)
    wanted = (rank.gather(1, judged)[..., None] - back).clamp_min(0)  # (batch, verdicts, count)
    return place.gather(1, wanted.flatten(1)).unflatten(1, (-1, count))


def last_place(flags: torch.Tensor, index: torch.Tensor, otherwise: int = 0) -> torch.Tensor:
    """The last position (batch,) at which flags (batch, context) hold, or `otherwise`."""
    return torch.where(flags, index, otherwise).amax(-1)


def _compact(symbols: torch.Tensor, real: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    """The symbols of the real tokens alone, (batch, 1 + context), the first of them at 1; 0 elsewhere."""
    room = torch.zeros_like(nn.functional.pad(symbols, (1, 0)))  # (batch, 1 + context)
    return room.scatter(1, rank * real, symbols * real)


def ends_of(pattern: tuple[int, ...], symbols: torch.Tensor, real: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    """(batch, context), bool: does the pattern end at this token? Padding within it does not matter."""
    if not pattern:
        return torch.zeros_like(real)
    compact = nn.functional.pad(_compact(symbols, real, rank), (len(pattern) - 1, 0))
    wanted = torch.tensor(pattern, device=symbols.device)  # (pattern,)
    places = rank[..., None] + torch.arange(len(pattern), device=symbols.device)  # (batch, context, pattern)
    window = compact.gather(1, places.flatten(1)).unflatten(1, (-1, len(pattern)))  # (batch, context, pattern)
    return (window == wanted).all(-1) & real


def spelled_at_the_end(
    refusal: tuple[int, ...], symbols: torch.Tensor, real: torch.Tensor, rank: torch.Tensor, judged: torch.Tensor
) -> torch.Tensor:
    """How many tokens of the refusal the context ends in, (batch,), counting none up to the judged position."""
    longest = len(refusal) - 1
    if not longest:
        return torch.zeros_like(judged)
    compact = nn.functional.pad(_compact(symbols, real, rank), (longest, 0))  # (batch, longest + 1 + context)
    count = rank[:, -1]  # (batch,)
    offsets = torch.arange(longest, device=symbols.device) + 1  # (longest,)
    tail = compact.gather(1, count[:, None] + offsets)  # (batch, longest), the last tokens
    grid = offsets - 1 - (longest - offsets[:, None])  # (longest, longest): place in the refusal, if i + 1 are spelled
    wanted = torch.tensor(refusal, device=symbols.device)[grid.clamp_min(0)]
    match = ((tail[:, None, :] == wanted) | (grid < 0)).all(-1)  # (batch, longest)
    match = match & (offsets <= (count - rank.gather(1, judged[:, None])[:, 0])[:, None])
    return (match * offsets).amax(-1)
