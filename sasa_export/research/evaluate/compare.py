"""Is one arm better than another? The difference of their AUC on the same prompts, with an interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sasa_export.research.evaluate.detection import Curve, resamples
from sasa_export.research.evaluate.shares import CONFIDENCE, Interval


def difference(first: np.ndarray, second: np.ndarray, labels: np.ndarray, groups: Sequence[str]) -> Interval:
    """AUC of `first` less that of `second`, scores (prompts,); whole groups are drawn again, the same for both."""
    curves = (Curve(first, labels), Curve(second, labels))
    once = np.ones((1, len(labels)))
    value = float(curves[0].auc(once)[0] - curves[1].auc(once)[0])
    drawn = np.concatenate([curves[0].auc(weights) - curves[1].auc(weights) for weights in resamples(groups)])
    low, high = np.nanquantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(value, float(low), float(high))


def lowest_attack(
    scores: np.ndarray, refused: np.ndarray, labels: np.ndarray, over_refusal: float
) -> tuple[float, float] | None:
    """What the best threshold would give, chosen on these very prompts: attack success rate and over-refusal.

    Args:
        scores: (prompts,), P(unsafe); refused: (prompts,), bool, what the plain model refuses in its own words.
        over_refusal: the largest allowed.

    None where the plain model alone refuses more harmless prompts than that.
    """
    harmful = labels == 1
    best = None
    # Refused from a score on: every score, and more than the highest, where nothing is.
    for threshold in np.r_[np.unique(scores), np.inf]:
        says_no = refused | (scores >= threshold)
        found = (float((~says_no[harmful]).mean()), float(says_no[~harmful].mean()))
        if found[1] <= over_refusal and (best is None or found < best):
            best = found
    return best
