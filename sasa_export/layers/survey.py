"""All evidence: the model runs on prompts and controls, then the figures. A patch with `auto` layers needs it as much
as a report does.

A batch's hidden states stay in memory while it is worked on; what is kept is small: the last token's state and its
five likeliest tokens behind every block, and one state of each second lane.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from sasa_export.graph.rewrite import LaneSettings, rewrite_lane
from sasa_export.layers.expression import Expression, expression, token_texts
from sasa_export.layers.lane import Batch, MainLane
from sasa_export.layers.pairs import Pair
from sasa_export.layers.perception import separability
from sasa_export.layers.prompts import controls
from sasa_export.layers.sweep import Sweep, second_lane, sweep
from sasa_export.layers.understanding import understanding
from sasa_export.models.load import head_weight
from sasa_export.probe.fit import head_metric
from sasa_export.probe.intervals import Comparable
from sasa_export.probe.work import Results, Work
from sasa_export.prompts.prompt import Prompt
from sasa_export.report import Silent
from sasa_export.workers import workers

LIKELIEST = 5  # tokens that the logit lens looks at
MAIN_LANE = ("tokens", "plain", "states")  # what `_of_main_lane` gives


@dataclass(frozen=True)
class Evidence:
    """The three capabilities block by block, and the sweep.

    Attributes:
        perception: AUC behind each block, of "all" prompts and of each channel.
        understanding: alignment behind each block with the "text_only" and the "image_dominant" control, or None.
    """

    perception: dict[str, list[Comparable]]
    understanding: dict[str, list[Comparable]] | None
    expression: Expression
    sweep: Sweep


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
    results = Results(work, "prompts", prompts, batch_size)
    on_controls = Results(work, "controls", controls(prompts), batch_size)
    lanes = {
        second_lane((safety, semantic)): rewrite_lane(
            lane.graph, replace(settings, safety_layer=safety, semantic_layer=semantic)
        )
        for safety, semantic in pairs
    }

    def compute(some: list[Prompt], missing: list[str]) -> Iterator[tuple[str, np.ndarray]]:
        batch = lane.run(some)
        for name in missing:
            if name in lanes:
                yield name, lane.second(batch, lanes[name]).float().cpu().numpy()  # (rows, hidden)
        if set(MAIN_LANE) & set(missing):
            yield from _of_main_lane(lane, batch)

    results.fill([*lanes, *MAIN_LANE], compute, report)
    on_controls.fill(MAIN_LANE, compute, report)
    if not workers().leads:
        return None
    return evidence_of(results, on_controls, pairs, head_weight(lane.model), lane.processor, regularization, report)


def evidence_of(
    results: Results,
    on_controls: Results,
    pairs: Sequence[Pair],
    head: np.ndarray,
    processor: Any,
    regularization: float | None,
    report: Silent,
) -> Evidence:
    """The figures, once the model has run; head (vocabulary, hidden)."""
    tokens = results.read("tokens")  # (prompts, blocks, 5)
    perception = separability(results, tokens.shape[1], report)
    swept = sweep(results, pairs, head_metric(head), regularization, report)
    expressed = expression(tokens, token_texts(processor.tokenizer, len(head)))
    return Evidence(perception, understanding(on_controls, tokens.shape[1]), expressed, swept)


def _of_main_lane(lane: MainLane, batch: Batch) -> Iterator[tuple[str, np.ndarray]]:
    """Behind each block the likeliest tokens, (rows, blocks, 5), and the last token's "states", (rows, blocks, hidden);
    and "plain", the normed state at the end, (rows, hidden)."""
    states = lane.states(batch)
    normed = [lane.normed(state) for state in states]  # (rows, hidden) each
    tokens = [lane.head(state).topk(LIKELIEST).indices.cpu() for state in normed]  # (rows, 5) each
    yield "tokens", torch.stack(tokens, 1).numpy().astype(np.int32)
    yield "plain", normed[-1].float().cpu().numpy()
    yield "states", torch.stack([state.float().cpu() for state in states], 1).numpy()
