"""Safety heads: those whose loss turns the harmful prompts' states and leaves the ordinary ones' as they are.

For each label, X (prompts, hidden) holds the last token's final states, and its leading right singular vector is the
direction that they share. The angle between that vector with all heads and with one head ablated says how much the
head matters to prompts of the label. A head's score is its angle on harmful prompts less that on ordinary ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sasa_export.research.locate.ablation import ablated, intact
from sasa_export.research.locate.work import Work

OUTLIER = 4.0  # robust standard deviations above the median score that make a head stand out
SAFETY_ONLY = 2.0  # and so many times the angle on ordinary prompts
LEAST_ANGLE = 0.05  # degrees; below it rounding alone turns the vector


@dataclass(frozen=True)
class HeadScores:
    """Angles in degrees, each (blocks, heads), for the ablated `blocks` in order.

    `reliability` is the rank correlation between the scores of two halves of the prompts: 0 says that the scores are
    noise, 1 that more prompts would not change their order. None where there are too few prompts for halves.
    """

    blocks: tuple[int, ...]
    harmful: np.ndarray
    ordinary: np.ndarray
    prompts: int
    reliability: float | None

    @property
    def scores(self) -> np.ndarray:
        return self.harmful - self.ordinary

    def safety_heads(self) -> list[tuple[int, int, float]]:
        """(block, head, score) of the heads that matter for safety only, the most important first.

        A head counts where its score lies four robust standard deviations above the median of all, and its angle on
        harmful prompts is twice that on ordinary ones.
        """
        scores = self.scores
        middle = np.median(scores)
        spread = 1.4826 * np.median(np.abs(scores - middle))
        outstanding = (scores > middle + OUTLIER * spread) & (self.harmful >= SAFETY_ONLY * self.ordinary)
        found = np.argwhere(outstanding & (self.harmful >= LEAST_ANGLE))
        listed = [(self.blocks[place], int(head), float(scores[place, head])) for place, head in found]
        return sorted(listed, key=lambda entry: -entry[2])

    def centre(self) -> int | None:
        """The block at which half of the safety heads' summed score is reached; None where there are none."""
        heads = sorted(self.safety_heads())
        total, reached = sum(score for _, _, score in heads), 0.0
        for block, _, score in heads:
            reached += score
            if reached >= total / 2 * (1 - 1e-6):
                return block
        return None

    def to_json(self) -> dict[str, Any]:
        return {
            "blocks": list(self.blocks),
            "prompts_of_each_label": self.prompts,
            "degrees_harmful": self.harmful.round(4).tolist(),
            "degrees_ordinary": self.ordinary.round(4).tolist(),
            "rank_correlation_of_two_halves": None if self.reliability is None else round(self.reliability, 4),
            "safety_heads": [
                {"block": block, "head": head, "score": round(score, 4)} for block, head, score in self.safety_heads()
            ],
        }


def leading(states: np.ndarray) -> np.ndarray:
    """The leading right singular vector (hidden,) of states (prompts, hidden)."""
    return np.linalg.svd(states.astype(np.float64), full_matrices=False)[2][0]


def degrees(first: np.ndarray, second: np.ndarray) -> float:
    """The angle between two unit vectors (hidden,), whichever way either points: 0 to 90."""
    along = abs(float(first @ second))
    # By the sine, since the cosine of a small angle rounds to 1.
    aside = float(np.linalg.norm(second - np.sign(first @ second) * along * first))
    return float(np.degrees(np.arctan2(aside, along)))


def head_scores(work: Work, rows: dict[int, list[int]], blocks: Sequence[int]) -> HeadScores:
    """From the work folder: `rows` are the prompts' numbers by label (1 harmful, 0 ordinary)."""
    harmful, ordinary = (_angles(work, rows[label], blocks) for label in (1, 0))  # (blocks, heads)
    count = min(len(rows[1]), len(rows[0]))
    return HeadScores(tuple(blocks), harmful, ordinary, count, _reliability(work, rows, blocks))


def _reliability(work: Work, rows: dict[int, list[int]], blocks: Sequence[int]) -> float | None:
    from scipy.stats import spearmanr

    halves = []
    for half in (0, 1):
        # Two by two, since text and picture may take turns.
        kept = {
            label: [row for place, row in enumerate(held) if place // 2 % 2 == half] for label, held in rows.items()
        }
        if not kept[1] or not kept[0]:
            return None
        halves.append(np.ravel(_angles(work, kept[1], blocks) - _angles(work, kept[0], blocks)))
    if np.ptp(halves[0]) == 0 or np.ptp(halves[1]) == 0:  # all heads alike: no order to compare
        return 0.0
    return float(spearmanr(*halves).statistic)


def _angles(work: Work, rows: Sequence[int], blocks: Sequence[int]) -> np.ndarray:
    before = leading(np.stack([work.get(intact(row)) for row in rows]))  # (hidden,)
    angles = []
    for block in blocks:
        after = np.stack([work.get(ablated(row, block)) for row in rows], axis=1)  # (heads, prompts, hidden)
        angles.append([degrees(before, leading(states)) for states in after])
    return np.array(angles)  # (blocks, heads)
