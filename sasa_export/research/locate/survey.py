"""All evidence but the heads': passes over prompts and controls, then the figures. A patch with `auto` layers needs it
as much as a report does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sasa_export.graph.rewrite import LaneSettings, rewrite_lane
from sasa_export.models.load import head_weight
from sasa_export.probe.fit import head_metric
from sasa_export.prompts.prompt import Prompt
from sasa_export.report import Silent
from sasa_export.research.locate.expression import Expression, expression, token_texts
from sasa_export.research.locate.interval import Estimate
from sasa_export.research.locate.lane import MainLane
from sasa_export.research.locate.pairs import Pair
from sasa_export.research.locate.passes import Passes
from sasa_export.research.locate.perception import separability
from sasa_export.research.locate.prompts import controls
from sasa_export.research.locate.sweep import Sweep, sweep
from sasa_export.research.locate.understanding import Alignment, understanding
from sasa_export.research.work import Work
from sasa_export.workers import workers


@dataclass(frozen=True)
class Evidence:
    """The three capabilities block by block, the sweep, the passes that they come from, and every token's text."""

    perception: dict[str, list[Estimate]]  # AUC behind each block, of "all" prompts and of each channel
    understanding: Alignment | None
    expression: Expression
    sweep: Sweep
    passes: Passes
    vocabulary: list[str]


def survey(
    lane: MainLane,
    prompts: Sequence[Prompt],
    pairs: Sequence[Pair],
    settings: LaneSettings,
    work: Work,
    report: Silent,
    *,
    batch_size: int,
    regularization: float | None = None,
) -> Evidence | None:
    """Run the model on the prompts, with all second lanes, and on the controls; then compute the figures.

    Args:
        settings: of every second lane, but for its pair of layers.
        regularization: the C of the sweep's probes; None chooses it as calibration does.

    All processes run the model, and all but the first return None.
    """
    passes = Passes(work, "prompts", prompts, batch_size)
    on_controls = Passes(work, "controls", controls(prompts), batch_size)
    lanes = {
        (safety, semantic): rewrite_lane(lane.graph, replace(settings, safety_layer=safety, semantic_layer=semantic))
        for safety, semantic in pairs
    }
    for these, second_lanes in ((passes, lanes), (on_controls, {})):
        with report.bar(len(these.batches), f"run {these.kind}") as advance:
            these.run(lane, second_lanes, advance)
    if not workers().leads:
        return None
    blocks, head = len(lane.blocks), head_weight(lane.model)  # (vocabulary, hidden)
    vocabulary = token_texts(lane.processor.tokenizer, len(head))
    with report.bar(blocks, "separate") as advance:
        perception = separability(passes, blocks, advance)
    with report.bar(len(pairs) + 1, "sweep") as advance:
        swept = sweep(passes, pairs, head_metric(head), regularization, advance)
    expressed = expression(passes.read("tokens"), vocabulary)
    return Evidence(perception, understanding(on_controls, blocks), expressed, swept, passes, vocabulary)
