"""Propose a safety and a semantic layer, with reasons. Three rules apply in this order.

1. The *safety layer* is among the blocks with the highest AUC of harmful against harmless prompts, within noise.
2. The *semantic layer* is among the blocks with the highest alignment of picture and text, within noise. Only blocks
   before the states become readable count.
3. The *sweep* decides among the measured pairs of such layers, or the nearest pairs. Of the pairs within noise of the
   best, the cheapest wins: fewest blocks in the second lane, then the earliest semantic layer. If a pair outside this
   selection is better by more than noise, the same rule applies to all measured pairs.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby

from sasa_export.layers.pairs import Pair
from sasa_export.layers.survey import Evidence
from sasa_export.layers.sweep import Sweep, cheapest
from sasa_export.probe.intervals import Comparable, best, is_below, within_noise

Blocks = Sequence[int]


@dataclass(frozen=True)
class Proposal:
    """The chosen layers, the blocks of rules 1 and 2, and the measured pairs there (`candidates`). `tied`: pairs within
    noise of the best candidate, or of the best pair if overruled. `reason`: sentences with a heading before a colon."""

    safety_layer: int
    semantic_layer: int
    safety_blocks: tuple[int, ...]
    semantic_blocks: tuple[int, ...]
    candidates: tuple[Pair, ...]
    tied: tuple[Pair, ...]
    reason: tuple[str, ...]

    @property
    def pair(self) -> Pair:
        return self.safety_layer, self.semantic_layer


def propose(evidence: Evidence) -> Proposal:
    """Return the proposal by the rules in the module's docstring."""
    safety_blocks, safety_reason = _safety_blocks(evidence.perception["all"])
    semantic_blocks, semantic_reason = _semantic_blocks(evidence, min(safety_blocks) + 1)
    swept = evidence.sweep
    candidates = nearest(list(swept.pairs), safety_blocks, semantic_blocks)
    tied = swept.tied(candidates)
    chosen, highest = cheapest(tied), best(swept.pairs)
    inside = all(pair[0] in safety_blocks and pair[1] in semantic_blocks for pair in candidates)
    reason = [
        f"Sweep: of {len(swept.pairs)} pairs measured, {_count(candidates)} "
        f"{'of such layers' if inside else 'nearest to such layers'}; of these, {_count(tied)} within noise of the "
        f"best one, and {_named(chosen)} {'is it' if len(tied) == 1 else 'is the cheapest'}."
    ]
    if is_below(swept.pairs[chosen], swept.pairs[highest], len(swept.pairs)):
        tied = swept.tied(list(swept.pairs))
        chosen = cheapest(tied)
        reason.append(
            f"Overruled: a pair outside is better by more than noise ({_named(highest)}, AUC {swept.pairs[highest]}), "
            f"so the sweep decides alone, and {_named(chosen)} is the cheapest within noise of it."
        )
    reason = [*safety_reason, *semantic_reason, *reason, _on_projection(swept, chosen)]
    return Proposal(
        *chosen, tuple(safety_blocks), tuple(semantic_blocks), tuple(candidates), tuple(tied), tuple(reason)
    )


def nearest(pairs: Sequence[Pair], safety_blocks: Blocks, semantic_blocks: Blocks) -> list[Pair]:
    """Return the pairs with the smallest summed distance, in blocks, from the given blocks; 0 means inside."""
    away = {
        (safety, semantic): min(abs(safety - block) for block in safety_blocks)
        + min(abs(semantic - block) for block in semantic_blocks)
        for safety, semantic in pairs
    }
    return [pair for pair in pairs if away[pair] == min(away.values())]


def _safety_blocks(curve: Sequence[Comparable]) -> tuple[list[int], list[str]]:
    estimates = dict(enumerate(curve))
    highest, last = best(estimates), len(curve) - 1
    # The last block is excluded, because no later block could be its semantic layer.
    found = [block for block in within_noise(estimates) if block != last] or [last - 1]
    reason = [
        f"Safety perception: separability is highest at block {highest} (AUC {curve[highest]}), and "
        f"{_others(found, highest)}."
    ]
    if curve[highest].low <= 0.5:
        reason.append(
            "Caution: no block tells harmful from harmless better than chance on these prompts, so what follows means "
            "little."
        )
    return found, reason


def _semantic_blocks(evidence: Evidence, first: int) -> tuple[list[int], list[str]]:
    """Return the blocks of rule 2 from `first` on, and the reasons."""
    expression, alignment = evidence.expression, evidence.understanding
    end = blocks = len(expression.readable)
    if expression.onset is None:
        reason = ["Linguistic expression: the share of readable tokens does not rise, so it sets no bound."]
    else:
        end = expression.onset if expression.onset > first else blocks
        reason = [
            f"Linguistic expression: the share of readable tokens makes half of its rise at block {expression.onset} "
            f"({expression.readable[expression.onset]:.0%}; chance is {expression.chance:.0%})."
        ]
    if alignment is None:
        reason.append("Semantic understanding: no picture prompts were given, so every later block is a candidate.")
        return list(range(first, end)) or [blocks - 1], reason
    estimates = dict(enumerate(alignment["text_only"][:end]))
    found, highest = within_noise(estimates), best(estimates)
    before = "" if end == blocks else f", of those before block {end}"
    reason.append(
        "Semantic understanding: picture and text align best with the same request in text at block "
        f"{highest} (cosine {estimates[highest]}){before}, and {_others(found, highest)}."
    )
    return [block for block in found if block >= first] or found, reason


def _on_projection(swept: Sweep, chosen: Pair) -> str:
    there, plain = swept.pairs[chosen], swept.plain
    if is_below(plain, there):
        said = "Projection helps here"
    elif is_below(there, plain):
        said = "Projection hurts here"
    else:
        said = "Projection neither helps nor hurts beyond noise"
    return f"{said}: AUC {there} with it, {plain} without it."


def spans(blocks: Blocks) -> str:
    """Return blocks in words: "block 3", "blocks 3 to 7 and 9"."""
    order = sorted(blocks)
    # In a run of consecutive blocks, block number minus index is constant.
    runs = [list(run) for _, run in groupby(order, lambda block: block - order.index(block))]
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return f"block {listed}" if len(blocks) == 1 else f"blocks {listed}"


def _others(blocks: Blocks, highest: int) -> str:
    others = set(blocks) - {highest}
    return f"within noise of that at {spans(blocks)}" if others else "at no other within noise of that"


def _named(pair: Pair) -> str:
    return f"{pair[0]} and {pair[1]}"


def _count(pairs: Collection[Pair]) -> str:
    return f"{len(pairs)} {'is' if len(pairs) == 1 else 'are'}"
