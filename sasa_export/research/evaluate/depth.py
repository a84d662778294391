"""Probing at an earlier block of the second lane: how well it does, against what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sasa_export.graph import LayerGraph
from sasa_export.prompts.prompt import Prompt
from sasa_export.research.evaluate.estimates import Estimate, auc, bootstrap, recall_at
from sasa_export.research.evaluate.fitted import probe


@dataclass(frozen=True)
class Depth:
    """A probe on the normed state behind `block` of the lane, or on the projection itself (the safety layer's number).

    `cost` is the number of blocks that the prompt runs through, in the plain model's.
    """

    block: int
    cost: float
    auc: Estimate
    recall_at_rate: Estimate


def depths_of(lane: LayerGraph) -> dict[int, str]:
    """The nodes within a lane that can be probed, by block: the projection, and all lane blocks but the last."""
    blocks = lane.of("lane_block")
    if not blocks:  # the projection itself is what the probe reads anyway
        return {}
    inner = {block.attributes["index"]: block.name for block in blocks[:-1]}
    return {blocks[0].attributes["index"] - 1: lane.of("projection")[0].name, **inner}


def depth_curve(
    calibration: Mapping[int, np.ndarray],
    evaluation: Mapping[int, np.ndarray],
    blocks: int,
    fitted_on: Sequence[Prompt],
    prompts: Sequence[Prompt],
    rate: float,
    regularization: float | None,
) -> list[Depth]:
    """Fit and measure a probe at each depth; features (prompts, hidden) in the head's metric, by block.

    `blocks` is the number of the decoder's; `rate` and `regularization` are as in `probe`.
    """
    labels = np.array([prompt.label for prompt in prompts])
    groups = [prompt.group for prompt in prompts]
    safety = min(calibration)
    found = []
    for block in sorted(calibration):
        scores = probe(calibration[block], evaluation[block], fitted_on, rate, regularization).scores
        area = bootstrap(lambda weights, scores=scores: auc(scores, labels, weights), groups)
        recall = bootstrap(lambda weights, scores=scores: recall_at(rate, scores, labels, weights), groups)
        found.append(Depth(block, (blocks + block - safety) / blocks, area, recall))
    return found
