"""The proposal: safety and semantic layer, and why.

Three rules, in this order. The *safety layer* is one of the blocks at which harmful and harmless prompts are as
separable as they get, within noise; where safety heads were found, not before the block that half of their score is
reached at. The *semantic layer* is one of the blocks at which the state of picture and text is as close to that of the
same request in text as it gets, within noise, before the states become readable. Among the measured pairs of such
layers (or the nearest to them), the *sweep* decides; of pairs within noise of the best, the cheapest is taken: the one
whose second lane runs fewest blocks, then the one whose semantic layer comes first. Where a pair outside is better by
more than noise, it is taken instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sasa_export.research.locate.alignment import Alignment
from sasa_export.research.locate.expression import Expression
from sasa_export.research.locate.heads import HeadScores
from sasa_export.research.locate.interval import is_below
from sasa_export.research.locate.pairs import Pair
from sasa_export.research.locate.separability import Separability
from sasa_export.research.locate.sweep import Sweep


@dataclass(frozen=True)
class Proposal:
    """The pair, the blocks that the evidence points to, the pairs tied with the choice, and the reason in words."""

    safety: int
    semantic: int
    safety_blocks: tuple[int, ...]
    semantic_blocks: tuple[int, ...]
    candidates: tuple[Pair, ...]
    tied: tuple[Pair, ...]
    reason: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "safety_layer": self.safety,
            "semantic_layer": self.semantic,
            "safety_blocks": list(self.safety_blocks),
            "semantic_blocks": list(self.semantic_blocks),
            "candidates": [list(pair) for pair in self.candidates],
            "tied": [list(pair) for pair in self.tied],
            "reason": list(self.reason),
        }


def propose(
    separability: Separability,
    alignment: Alignment | None,
    expression: Expression,
    heads: HeadScores | None,
    sweep: Sweep,
) -> Proposal:
    """Apply the rules above."""
    reason: list[str] = []
    safety_blocks = _safety_blocks(separability, heads, reason)
    semantic_blocks = _semantic_blocks(alignment, expression, safety_blocks, reason)
    candidates = nearest(list(sweep.pairs), safety_blocks, semantic_blocks)
    tied = sweep.tied(candidates)
    chosen = cheapest(tied)
    best = sweep.best()
    inside = all(pair[0] in safety_blocks and pair[1] in semantic_blocks for pair in candidates)
    reason.append(
        f"Sweep: of {len(sweep.pairs)} pairs measured, {_count(len(candidates), 'is', 'are')} "
        + ("of such layers" if inside else "nearest to such layers")
        + f"; of these, {_count(len(tied), 'is', 'are')} within noise of the best one, and {_named(chosen)} "
        + ("is it." if len(tied) == 1 else "is the cheapest.")
    )
    if is_below(sweep.pairs[chosen], sweep.pairs[best], len(sweep.pairs)):
        tied = sweep.tied(list(sweep.pairs))
        chosen = cheapest(tied)
        reason.append(
            f"Overruled: a pair outside is better by more than noise ({_named(best)}, AUC {sweep.pairs[best]}), so "
            f"the sweep decides alone, and {_named(chosen)} is the cheapest within noise of it."
        )
    reason.append(_on_projection(sweep, chosen))
    return Proposal(
        *chosen, tuple(safety_blocks), tuple(semantic_blocks), tuple(candidates), tuple(tied), tuple(reason)
    )


def cheapest(pairs: Sequence[Pair]) -> Pair:
    """The pair with the shortest second lane, then with the earliest semantic layer."""
    return min(pairs, key=lambda pair: (-pair[0], pair[1]))


def nearest(pairs: Sequence[Pair], safety_blocks: Sequence[int], semantic_blocks: Sequence[int]) -> list[Pair]:
    """The pairs whose layers are among the given blocks, or fewest blocks away from them in sum."""

    def away(pair: Pair) -> int:
        return min(abs(pair[0] - block) for block in safety_blocks) + min(
            abs(pair[1] - block) for block in semantic_blocks
        )

    least = min(away(pair) for pair in pairs)
    return [pair for pair in pairs if away(pair) == least]


def _safety_blocks(separability: Separability, heads: HeadScores | None, reason: list[str]) -> list[int]:
    # Nothing lies behind the last block that could be a semantic layer.
    found = [block for block in separability.blocks_within_noise() if block < len(separability.overall) - 1]
    found = found or [len(separability.overall) - 2]
    best = max(range(len(separability.overall)), key=lambda block: separability.overall[block].value)
    reason.append(
        f"Safety perception: separability is highest at block {best} (AUC {separability.overall[best]}), and "
        f"{_within_noise(found, best)}."
    )
    if separability.overall[best].low <= 0.5:
        reason.append(
            "Caution: no block tells harmful from harmless better than chance on these prompts, so what follows means "
            "little."
        )
    if heads is None:
        return found
    centre = heads.centre()
    if centre is None:
        reason.append(f"Safety heads: none of {spans(heads.blocks)} stands out as one that matters for safety only.")
        return found
    count = len(heads.safety_heads())
    behind = [block for block in found if block >= centre]
    if not behind:
        agrees = "behind every block where separability is highest, so they do not decide"
    elif behind == found:
        agrees = "which agrees with it"
    else:
        agrees = f"which narrows it to {spans(behind)}"
    reason.append(
        f"Safety heads: {count} found in {spans(heads.blocks)}; half of their score is reached at block {centre}, "
        f"{agrees}."
    )
    return behind or found


def _semantic_blocks(
    alignment: Alignment | None, expression: Expression, safety_blocks: Sequence[int], reason: list[str]
) -> list[int]:
    blocks = len(expression.readable)
    onset = expression.onset()
    if onset is None:
        reason.append("Linguistic expression: the share of readable tokens does not rise, so it sets no bound.")
    else:
        reason.append(
            f"Linguistic expression: the share of readable tokens makes half of its rise at block {onset} "
            f"({expression.readable[onset]:.0%}; chance is {expression.chance:.0%})."
        )
    end = blocks if onset is None or onset <= min(safety_blocks) + 1 else onset
    if alignment is None:
        reason.append("Semantic understanding: no picture prompts were given, so every later block is a candidate.")
        return [block for block in range(min(safety_blocks) + 1, end)] or [blocks - 1]
    found = alignment.blocks_within_noise(end)
    best = max(range(end), key=lambda block: alignment.text[block].value)
    before = "" if end == blocks else f", of those before block {end}"
    reason.append(
        "Semantic understanding: picture and text align best with the same request in text at block "
        f"{best} (cosine {alignment.text[best]}){before}, and {_within_noise(found, best)}."
    )
    later = [block for block in found if block > min(safety_blocks)]
    return later or found


def _on_projection(sweep: Sweep, chosen: Pair) -> str:
    there, plain = sweep.pairs[chosen], sweep.plain
    if is_below(plain, there):
        word = "Projection helps here"
    elif is_below(there, plain):
        word = "Projection hurts here"
    else:
        word = "Projection neither helps nor hurts beyond noise"
    return f"{word}: AUC {there} with it, {plain} without it."


def spans(blocks: Sequence[int]) -> str:
    """Blocks in words: "block 3", "blocks 3 to 7 and 9"."""
    runs: list[list[int]] = []
    for block in sorted(blocks):
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return f"block {listed}" if len(blocks) == 1 else f"blocks {listed}"


def _within_noise(blocks: Sequence[int], best: int) -> str:
    return f"within noise of that at {spans(blocks)}" if set(blocks) - {best} else "at no other within noise of that"


def _named(pair: Pair) -> str:
    return f"{pair[0]} and {pair[1]}"


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
