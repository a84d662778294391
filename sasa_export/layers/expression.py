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
    """Behind each block, the share of readable tokens among the five likeliest; `chance` is the readable share of the
    vocabulary, `onset` the block where words begin."""

    readable: list[float]
    chance: float
    onset: int | None


def expression(tokens: np.ndarray, vocabulary: Sequence[str]) -> Expression:
    """From the likeliest tokens (prompts, blocks, 5) and every token's text."""
    readable = np.array([is_readable(text) for text in vocabulary])  # (vocabulary,)
    share = readable[tokens].mean((0, 2)).tolist()  # (blocks,)
    known = sum(bool(text) for text in vocabulary)
    return Expression(share, float(readable.sum() / max(known, 1)), onset(share))


def onset(readable: Sequence[float]) -> int | None:
    """The first block at which the readable share has made half of its way from its lowest to its last value.

    None where the last block's share is hardly above the lowest.
    """
    lowest = int(np.argmin(readable))
    rise = readable[-1] - readable[lowest]
    if rise < LEAST_RISE:
        return None
    half = readable[lowest] + rise / 2
    return next(block for block in range(lowest, len(readable)) if readable[block] >= half)


def is_readable(text: str) -> bool:
    """Is a decoded token a piece of a word?"""
    return WORD.fullmatch(text.strip()) is not None


def token_texts(tokenizer: Any, size: int) -> list[str]:
    """Every token's text; control tokens, and numbers that the tokenizer does not have, are empty."""
    special = set(tokenizer.all_special_ids)
    texts = tokenizer.batch_decode([[number] for number in range(min(size, len(tokenizer)))])
    found = ["" if number in special else text for number, text in enumerate(texts)]
    return found + [""] * (size - len(found))
