"""Probing at an earlier block of the second lane: how well it does, against what it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sasa_export.graph import LayerGraph
from sasa_export.prompts.prompt import Prompt
from sasa_export.research.evaluate.detection import detection
from sasa_export.research.evaluate.fitted import probe
from sasa_export.research.evaluate.shares import Interval


@dataclass(frozen=True)
class Depth:
    """A probe on the normed state behind `block` of the lane, or on the projection itself (the safety layer's number).

    `cost` is the number of blocks that the prompt runs through, in the plain model's.
    """

    block: int
    cost: float
    auc: Interval
    recall_at_rate: Interval

    def to_json(self) -> dict[str, Any]:
        return {
            "block": self.block,
            "cost": round(self.cost, 4),
            "auc": self.auc.to_json(),
            "recall_at_rate": self.recall_at_rate.to_json(),
        }


def depths_of(lane: LayerGraph) -> dict[int, str]:
    """The nodes within a lane that can be probed, by block: the projection, and all lane blocks but the last."""
    blocks = lane.of("lane_block")
    if not blocks:  # the projection itself is what the probe reads anyway
        return {}
    first = blocks[0].attributes["index"]  # the block after the safety layer
    inner = {first + place: node.name for place, node in enumerate(blocks[:-1])}
    return {first - 1: lane.of("projection")[0].name, **inner}


def depth_curve(
    calibration: Mapping[int, np.ndarray],
    evaluation: Mapping[int, np.ndarray],
    blocks: int,
    fitted_on: Sequence[Prompt],
    prompts: Sequence[Prompt],
    rate: float,
    regularization: float | None,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[Depth, ...]:
    """Fit and measure a probe at each depth; features (prompts, hidden) in the head's metric, by block.

    `blocks` is the number of the decoder's; `advance` counts depths.
    """
    labels = np.array([prompt.label for prompt in prompts])
    groups = [prompt.group for prompt in prompts]
    safety = min(calibration)
    found = []
    for block in sorted(calibration):
        fitted = probe(calibration[block], evaluation[block], fitted_on, rate, regularization)
        threshold = 1.0 if fitted.threshold is None else fitted.threshold
        figures = detection(fitted.scores, fitted.scores >= threshold, labels, groups, rate)
        assert figures is not None  # both labels are there, or the evaluation would have stopped
        cost = (blocks + block - safety) / blocks
        found.append(Depth(block, cost, figures.auc, figures.recall_at_rate))
        advance(1)
    return tuple(found)
