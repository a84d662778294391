"""All evidence but the heads': passes over prompts and controls, then the figures. A patch with `auto` layers needs it
as much as a report does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sasa_export.models.load import head_weight
from sasa_export.probe.features import batches
from sasa_export.probe.fit import head_metric
from sasa_export.prompts.prompt import Prompt
from sasa_export.report import Silent
from sasa_export.research.locate.alignment import Alignment
from sasa_export.research.locate.evidence import expressed, flat, perceived, understood
from sasa_export.research.locate.expression import Expression
from sasa_export.research.locate.lane import MainLane
from sasa_export.research.locate.pairs import Pair
from sasa_export.research.locate.passes import Lanes, run_passes
from sasa_export.research.locate.prompts import controls
from sasa_export.research.locate.separability import Separability
from sasa_export.research.locate.sweep import Sweep, sweep
from sasa_export.research.locate.work import Work
from sasa_export.workers import Workers


@dataclass(frozen=True)
class Survey:
    """The figures, the states that they come from, and every token's text."""

    separability: Separability
    alignment: Alignment | None
    expression: Expression
    sweep: Sweep
    lanes: Lanes
    words: np.ndarray  # (prompts, blocks, 5)
    pieces: list[str]


@dataclass(frozen=True)
class Way:
    """How a survey runs: the pairs swept, batches, the projection's epsilon, the cap on logits, and the probe's C."""

    pairs: tuple[Pair, ...]
    batch_size: int
    epsilon: float
    softcap: float | None
    regularization: float | None = None


def run_lanes(
    lane: MainLane, prompts: Sequence[Prompt], way: Way, work: Work, workers: Workers, report: Silent
) -> tuple[Lanes, Lanes]:
    """Run the model on everything that a survey needs: the prompts with all second lanes, and the controls."""
    passes = []
    for kind, listed, pairs in (("prompts", prompts, way.pairs), ("controls", flat(controls(prompts)), ())):
        with report.bar(sum(1 for _ in batches(listed, way.batch_size)), f"run {kind}") as advance:
            passes.append(
                run_passes(
                    lane,
                    listed,
                    pairs,
                    work,
                    workers,
                    kind=kind,
                    batch_size=way.batch_size,
                    epsilon=way.epsilon,
                    softcap=way.softcap,
                    advance=advance,
                )
            )
    return passes[0], passes[1]


def survey(lane: MainLane, prompts: Sequence[Prompt], passes: tuple[Lanes, Lanes], way: Way, report: Silent) -> Survey:
    """The figures, from what `run_lanes` left."""
    lanes, control_lanes = passes
    blocks = len(lane.modules)
    head = head_weight(lane.model)  # (vocabulary, hidden)
    with report.bar(blocks, "separate") as advance:
        separability = perceived(lanes, prompts, blocks, advance)
    alignment = understood(control_lanes, controls(prompts), blocks)
    words = lanes.words()
    expression, pieces = expressed(words, lane.processor.tokenizer, head.shape[0])
    metric = head_metric(head)
    with report.bar(len(way.pairs) + 1, "sweep") as advance:
        swept = sweep(lanes, prompts, way.pairs, metric, regularization=way.regularization, advance=advance)
    return Survey(separability, alignment, expression, swept, lanes, words, pieces)
