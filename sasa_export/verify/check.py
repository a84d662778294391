"""One check of a patched directory: passed or not, and the number behind it; and what an answer may become."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """`name` says what holds, `detail` what was measured."""

    name: str
    passed: bool
    detail: str


def cut_short(original: list[int], found: list[int], refusal: list[int]) -> bool:
    """Is an answer the original's up to a place, and from there on the refusal?"""
    same = next((at for at, pair in enumerate(zip(original, found, strict=False)) if pair[0] != pair[1]), len(found))
    # The refusal may begin with the words that the original had there too.
    return any(found[place:] == refusal[: len(found) - place] for place in range(same + 1))
