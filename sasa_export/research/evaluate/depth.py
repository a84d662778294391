"""Probing at an earlier block of the second lane: how well it does, against what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sasa_export.graph import LayerGraph
from sasa_export.research.evaluate.arms import ranking
from sasa_export.research.evaluate.fitted import probe
from sasa_export.research.evaluate.subject import Subject


def depths_of(lane: LayerGraph) -> dict[int, str]:
    """The nodes within a lane that can be probed, by block: the projection, and all lane blocks but the last."""
    blocks = lane.of("lane_block")
    if not blocks:  # the projection itself is what the probe reads anyway
        return {}
    inner = {block.attributes["index"]: block.name for block in blocks[:-1]}
    return {blocks[0].attributes["index"] - 1: lane.of("projection")[0].name, **inner}


def depth_curve(subject: Subject, features: Mapping[str, Mapping[str, np.ndarray]]) -> list[dict[str, Any]]:
    """Fit and measure a probe on the normed state behind each `block` of the lane, the first on the projection itself.

    `cost` is the number of blocks that the prompt runs through, in the plain model's.

    `features` (prompts, hidden), in the head's metric, of the "calibration" and the "evaluation" prompts, by node;
    "projected" are those of the lane's end. Empty where the lane ends with the projection.
    """
    depths, blocks = depths_of(subject.lane), subject.blocks[0]
    if not depths:
        return []
    last = subject.lane.of("lane_block")[-1].attributes["index"]
    labels = np.array([prompt.label for prompt in subject.evaluation])
    groups = [prompt.group for prompt in subject.evaluation]
    found = []
    for block, node in {**depths, last: "projected"}.items():
        before, after = features["calibration"][node], features["evaluation"][node]
        scores, _ = probe(before, after, subject.calibration, subject.rate, subject.regularization)
        cost = (blocks + block - min(depths)) / blocks
        found.append({"block": block, "cost": cost, **ranking(scores, labels, groups, subject.rate)})
    return found
