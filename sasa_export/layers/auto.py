"""Choose layers during a patch (`--safety-layer auto --semantic-layer auto`), with the same survey as `locate`.

One half of the calibration prompts serves to choose the layers. The card's figures come from the other half. The probe
is fitted on both.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from sasa_export.graph import LayerGraph
from sasa_export.graph.rewrite import LaneSettings
from sasa_export.layers import LIMIT
from sasa_export.layers.pairs import Pair, default_pairs, possible
from sasa_export.layers.prompts import halves, limited
from sasa_export.layers.propose import Proposal, propose
from sasa_export.layers.survey import Evidence
from sasa_export.options import AUTO, Options
from sasa_export.prompts.prompt import Prompt
from sasa_export.report import Silent
from sasa_export.workers import workers


def choose_layers(
    survey: Callable[[Sequence[Prompt], Sequence[Pair]], Evidence | None],
    graph: LayerGraph,
    prompts: Sequence[Prompt],
    settings: LaneSettings,
    options: Options,
    report: Silent,
) -> tuple[LaneSettings, str, tuple[int, ...]]:
    """Return `settings` with both layers set, a description of their choice, and the row numbers of the held-out half.

    A layer that `options` set is kept. The held-out prompts took no part in the choice. Raises LocateError if either
    half of the prompts is too small.
    """
    fixed = [side if isinstance(side, int) else None for side in (options.safety_layer, options.semantic_layer)]
    pairs = possible(default_pairs(len(graph.of("block")), *fixed), graph.earliest_safety_layer())
    choosing, held_out = halves(prompts)
    chosen_on, _ = (limited([prompts[row] for row in half], LIMIT) for half in (choosing, held_out))
    evidence = survey(chosen_on, pairs)
    chosen = None
    if evidence is not None:
        proposal = propose(evidence)
        for reason in proposal.reason:
            report.step("", reason)
        chosen = proposal.pair, _in_words(evidence, proposal, both=fixed == [None, None])
    (safety, semantic), layers_from = workers().tell(chosen)  # type: ignore[misc]
    report.step("locate", f"safety layer {safety}, semantic layer {semantic}")
    settings = replace(settings, safety_layer=safety, semantic_layer=semantic)
    return settings, layers_from, tuple(held_out.tolist())


def _in_words(evidence: Evidence, proposal: Proposal, *, both: bool) -> str:
    sides = "safety and semantic layer" if both else f"the layer that was left to {AUTO}"
    others = "no other is" if len(proposal.tied) == 1 else f"{len(proposal.tied) - 1} others are"
    swept = evidence.sweep.pairs
    return (
        f"{sides} found by a sweep over {len(swept)} pairs on one half of the calibration prompts, where "
        f"{proposal.safety_layer} and {proposal.semantic_layer} have an AUC of {swept[proposal.pair]} and {others} "
        "within noise; the figures of the calibration are of the other half, which took no part in the choice"
    )
