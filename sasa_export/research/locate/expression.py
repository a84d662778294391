"""Linguistic expression: where hidden states become words (logit lens).

The final norm and the head are applied to the last token's state behind each block. A token is *readable* where it
decodes to letters alone: two or more, of any script, with at most an apostrophe or a hyphen among them, and space
around them. Pieces of bytes, punctuation, digits, single letters and control tokens are not. Since many tokens of a
vocabulary are readable anyway, the share in the whole vocabulary is given beside the curve: what chance would show.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

WORD = re.compile(r"[^\W\d_](?:['’-]?[^\W\d_])+")
LEAST_RISE = 0.1  # a curve that rises less than this does not say where words begin


@dataclass(frozen=True)
class Expression:
    """Behind each block, the share of readable tokens among the five likeliest, and of those that the last block
    ranks among its five too; `chance` is the readable share of the vocabulary."""

    readable: tuple[float, ...]
    settled: tuple[float, ...]
    chance: float

    def onset(self) -> int | None:
        """The first block at which the readable share has made half of its way from its lowest to its last value.

        None where the last block's share is hardly above the lowest.
        """
        lowest = int(np.argmin(self.readable))
        rise = self.readable[-1] - self.readable[lowest]
        if rise < LEAST_RISE:
            return None
        half = self.readable[lowest] + rise / 2
        return next(block for block in range(lowest, len(self.readable)) if self.readable[block] >= half)

    def to_json(self) -> dict[str, Any]:
        return {
            "readable": [round(share, 4) for share in self.readable],
            "already_final": [round(share, 4) for share in self.settled],
            "chance": round(self.chance, 4),
            "onset": self.onset(),
        }


def is_readable(piece: str) -> bool:
    """Is a decoded token a piece of a word?"""
    return WORD.fullmatch(piece.strip()) is not None


def vocabulary(tokenizer: Any, size: int) -> list[str]:
    """Every token's text; control tokens, and numbers that the tokenizer does not have, are empty."""
    special = set(tokenizer.all_special_ids)
    known = len(tokenizer)
    pieces = tokenizer.batch_decode([[number] for number in range(min(size, known))])
    found = ["" if number in special else piece for number, piece in enumerate(pieces)]
    return found + [""] * (size - len(found))


def expression(words: np.ndarray, pieces: Sequence[str]) -> Expression:
    """From the ranked tokens (prompts, blocks, 5) and every token's text."""
    readable = np.array([is_readable(piece) for piece in pieces])  # (vocabulary,)
    final = words[:, -1]  # (prompts, 5)
    settled = (words[..., None] == final[:, None, None, :]).any(-1)  # (prompts, blocks, 5)
    share = readable[words].mean((0, 2))  # (blocks,)
    known = sum(bool(piece) for piece in pieces)
    return Expression(
        tuple(share.tolist()), tuple(settled.mean((0, 2)).tolist()), float(readable.sum() / max(known, 1))
    )
