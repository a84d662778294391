"""`--safety-layer auto --semantic-layer auto`: the survey of a report, without its ablation and pictures, in a patch.

The layers are chosen on one half of the calibration prompts. The figures in the card are then of the other half, which
took no part in the choice; the probe itself is fitted on both.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sasa_export.graph import LayerGraph
from sasa_export.graph.rewrite import LaneSettings
from sasa_export.options import AUTO, Options
from sasa_export.prompts.prompt import Prompt
from sasa_export.report import Silent
from sasa_export.research.locate.lane import watched
from sasa_export.research.locate.pairs import Pair, with_layer
from sasa_export.research.locate.prompts import limited
from sasa_export.research.locate.propose import propose
from sasa_export.research.locate.survey import Way, run_lanes, survey
from sasa_export.research.locate.sweep import halves
from sasa_export.research.locate.work import Work
from sasa_export.workers import workers


@dataclass(frozen=True)
class Chosen:
    """The layers, where they are from in words, and the numbers of the prompts that took no part in the choice."""

    settings: LaneSettings
    layers_from: str
    held_out: tuple[int, ...]


def choose_layers(
    model: Any,
    processor: Any,
    graph: LayerGraph,
    prompts: Sequence[Prompt],
    settings: LaneSettings,
    options: Options,
    report: Silent,
) -> Chosen:
    """Choose the layers that `options` leave open. `settings` give what is no layer.

    Raises LocateError where either half of the prompts is too small to choose or to judge by.
    """
    blocks = len(graph.of("block"))
    given = [side if isinstance(side, int) else None for side in (options.safety_layer, options.semantic_layer)]
    pairs = with_layer(blocks, *given)
    way = Way(tuple(pairs), options.batch_size, settings.epsilon, settings.softcap, options.regularization_value())
    choosing, held_out = halves(prompts)
    chosen_on = limited([prompts[row] for row in choosing], None)
    limited([prompts[row] for row in held_out], None)
    team = workers()
    folder = Path(team.tell(tempfile.mkdtemp(prefix="sasa-export-layers-") if team.leads else ""))
    try:
        with watched(model, processor, graph) as lane:
            passes = run_lanes(lane, chosen_on, way, Work(folder), team, report)
            found: tuple[Pair, str] = ((0, 0), "")
            if team.leads:
                surveyed = survey(lane, chosen_on, passes, way, report)
                proposal = propose(surveyed.separability, surveyed.alignment, surveyed.expression, None, surveyed.sweep)
                for reason in proposal.reason:
                    report.step("", reason)
                pair = (proposal.safety, proposal.semantic)
                found = (pair, _in_words(len(pairs), pair, str(surveyed.sweep.pairs[pair]), len(proposal.tied), given))
            pair, layers_from = team.tell(found)
    finally:
        if team.leads:
            shutil.rmtree(folder, ignore_errors=True)
    report.step("locate", f"safety layer {pair[0]}, semantic layer {pair[1]}")
    return Chosen(
        replace(settings, safety_layer=pair[0], semantic_layer=pair[1]),
        layers_from,
        tuple(held_out.tolist()),
    )


def _in_words(count: int, pair: Pair, auc: str, tied: int, given: Sequence[int | None]) -> str:
    sides = "safety and semantic layer" if given == [None, None] else f"the layer that was left to {AUTO}"
    others = "no other is" if tied == 1 else f"{tied - 1} others are"
    return (
        f"{sides} found by a sweep over {count} pairs on one half of the calibration prompts, where {pair[0]} and "
        f"{pair[1]} have an AUC of {auc} and {others} within noise; the figures of the calibration are of the other "
        "half, which took no part in the choice"
    )
