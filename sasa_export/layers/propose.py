"""Propose a safety and a semantic layer, with reasons. Three rules apply in this order.

1. The *safety layer* is among the blocks with the highest AUC of harmful against harmless prompts, within noise.
2. The *semantic layer* is among the blocks with the highest alignment of picture and text, within noise. Only blocks
   before the states become readable count.
3. The *sweep* decides among the measured pairs of such layers, or the nearest pairs. Of the pairs within noise of the
   best, the cheapest wins: fewest blocks in the second lane, then the earliest semantic layer. If a pair outside this
   selection is better by more than noise, the same rule applies to all measured pairs.
"""

from collections.abc import Sequence
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
    reason = [
        f"Sweep: pairs measured: {len(swept.pairs)}; of such layers, or nearest to them: {len(candidates)}; of these, "
        f"within noise of the best one: {len(tied)}. Of these, {_named(chosen)} is the cheapest."
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
    blocks = [block for block in within_noise(estimates) if block != last] or [last - 1]
    reason = [
        f"Safety perception: separability is highest at block {highest} (AUC {curve[highest]}); within noise of that: "
        f"{spans(blocks)}."
    ]
    if curve[highest].low <= 0.5:
        reason.append(
            "Caution: no block tells harmful from harmless better than chance on these prompts, so what follows means "
            "little."
        )
    return blocks, reason


def _semantic_blocks(evidence: Evidence, first: int) -> tuple[list[int], list[str]]:
    """Return the blocks of rule 2 from `first` on, and the reasons."""
    expression, alignment = evidence.expression, evidence.understanding
    end = blocks = len(expression.readable)
    reason = ["Linguistic expression: the share of readable tokens does not rise, so it sets no bound."]
    if expression.onset is not None:
        end = expression.onset if expression.onset > first else blocks
        reason = [
            f"Linguistic expression: the share of readable tokens makes half of its rise at block {expression.onset} "
            f"({expression.readable[expression.onset]:.0%}; chance is {expression.chance:.0%})."
        ]
    if alignment is None:
        reason.append("Semantic understanding: no picture prompts were given, so every later block is a candidate.")
        return list(range(first, end)) or [blocks - 1], reason
    estimates = dict(enumerate(alignment["text_only"][:end]))
    aligned, highest = within_noise(estimates), best(estimates)
    reason.append(
        f"Semantic understanding: of the blocks before {end}, picture and text align best with the same request in "
        f"text at block {highest} (cosine {estimates[highest]}); within noise of that: {spans(aligned)}."
    )
    return [block for block in aligned if block >= first] or aligned, reason


def _on_projection(swept: Sweep, chosen: Pair) -> str:
    there, plain = swept.pairs[chosen], swept.plain
    effect = "neither helps nor hurts beyond noise"
    if is_below(plain, there):
        effect = "helps here"
    elif is_below(there, plain):
        effect = "hurts here"
    return f"Projection {effect}: AUC {there} with it, {plain} without it."


def spans(blocks: Blocks) -> str:
    """Return blocks in words: "block 3", "blocks 3 to 7, 9"."""
    order = sorted(blocks)
    # In a run of consecutive blocks, block number minus index is constant.
    runs = [list(run) for _, run in groupby(order, lambda block: block - order.index(block))]
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return f"block{'s' if len(blocks) > 1 else ''} {', '.join(parts)}"


def _named(pair: Pair) -> str:
    return f"{pair[0]} and {pair[1]}"
