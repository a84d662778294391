"""Safety heads: those whose loss turns the harmful prompts' states and leaves the ordinary ones' as they are.

For each label, X (prompts, hidden) holds the last token's final states, and its leading right singular vector is the
direction that they share. The angle between that vector with all heads and with one head ablated says how much the
head matters to prompts of the label. A head's score is its angle on harmful prompts less that on ordinary ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sasa_export.probe.work import Results

OUTLIER = 4.0  # robust standard deviations above the median score that make a head stand out
SAFETY_ONLY = 2.0  # and so many times the angle on ordinary prompts
LEAST_ANGLE = 0.05  # degrees; below it rounding alone turns the vector
INTACT = "all"  # the name of the states with all heads


def without(block: int) -> str:
    """The name of the states without each head of a block."""
    return f"block-{block:03d}"


@dataclass(frozen=True)
class SafetyHead:
    """A head that matters for safety only, and its score in degrees."""

    block: int
    head: int
    score: float


@dataclass(frozen=True)
class HeadScores:
    """Angles in degrees, each (blocks, heads), for the ablated `blocks` in order, and the safety heads among them.

    `rank_correlation_of_two_halves` compares the scores of two halves of the prompts: 0 says that the scores are
    noise, 1 that more prompts would not change their order. None where there are too few prompts for halves.
    """

    blocks: tuple[int, ...]
    prompts_of_each_label: int
    degrees_harmful: np.ndarray
    degrees_ordinary: np.ndarray
    rank_correlation_of_two_halves: float | None
    safety_heads: tuple[SafetyHead, ...]

    def centre(self) -> int | None:
        """The block at which half of the safety heads' summed score is reached; None where there are none."""
        if not self.safety_heads:
            return None
        heads = sorted(self.safety_heads, key=lambda found: (found.block, found.head))
        reached = np.cumsum([found.score for found in heads])
        return heads[int(np.argmax(reached >= reached[-1] / 2 * (1 - 1e-6)))].block


def head_scores(ablated: Results, blocks: Sequence[int]) -> HeadScores:
    """From the states that `ablate` left."""
    labels = np.array([prompt.label for prompt in ablated.prompts])
    rows = [np.flatnonzero(labels == label) for label in (1, 0)]  # of harmful and of ordinary prompts
    # Two by two, since text and picture may take turns.
    halves = [[of[np.arange(len(of)) // 2 % 2 == half] for of in rows] for half in (0, 1)]
    whole, *parts = (_angles(ablated, sets, blocks) for sets in (rows, *halves) if all(map(len, sets)))
    harmful, ordinary = whole
    correlation = _rank_correlation(*(part[0] - part[1] for part in parts)) if len(parts) == 2 else None
    heads = tuple(safety_heads(blocks, harmful, ordinary))
    return HeadScores(tuple(blocks), min(map(len, rows)), harmful, ordinary, correlation, heads)


def safety_heads(blocks: Sequence[int], harmful: np.ndarray, ordinary: np.ndarray) -> list[SafetyHead]:
    """The heads that matter for safety only, the most important first, from angles (blocks, heads) in degrees.

    A head counts where its score lies four robust standard deviations above the median of all, and its angle on
    harmful prompts is twice that on ordinary ones.
    """
    scores = harmful - ordinary
    middle = np.median(scores)
    spread = 1.4826 * np.median(np.abs(scores - middle))
    outstanding = (scores > middle + OUTLIER * spread) & (harmful >= SAFETY_ONLY * ordinary) & (harmful >= LEAST_ANGLE)
    found = [SafetyHead(blocks[row], int(head), float(scores[row, head])) for row, head in np.argwhere(outstanding)]
    return sorted(found, key=lambda head: -head.score)


def leading(states: np.ndarray) -> np.ndarray:
    """The leading right singular vector of states (prompts, hidden), as a column (hidden, 1)."""
    return np.linalg.svd(states.astype(np.float64), full_matrices=False)[2][:1].T


def _angles(ablated: Results, sets: Sequence[np.ndarray], blocks: Sequence[int]) -> np.ndarray:
    """How far each head turns each set of prompts (rows): (sets, blocks, heads), in degrees."""
    from scipy.linalg import subspace_angles

    intact = ablated.read(INTACT)  # (prompts, hidden)
    before = [leading(intact[rows]) for rows in sets]  # (hidden, 1) each
    angles = []
    for block in blocks:
        states = ablated.read(without(block)).transpose(1, 0, 2)  # (heads, prompts, hidden)
        pairs = zip(before, sets, strict=True)
        angles.append([[subspace_angles(whole, leading(head[rows]))[0] for head in states] for whole, rows in pairs])
    return np.degrees(angles).transpose(1, 0, 2)


def _rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    from scipy.stats import spearmanr

    if np.ptp(first) == 0 or np.ptp(second) == 0:  # all heads alike: no order to compare
        return 0.0
    return float(spearmanr(np.ravel(first), np.ravel(second)).statistic)
