"""Are the probabilities true? The Brier score, and the expected calibration error over ten bins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

BINS = 10


@dataclass(frozen=True)
class Reliability:
    """`brier` is the mean squared error of P(unsafe), `chance` that of always saying the share of harmful prompts;
    `error` is the mean distance between what the bins say and what is so, by number of prompts.

    `said`, `found` and `counts` are of the bins that hold prompts: mean P(unsafe), share of harmful ones, prompts.
    """

    brier: float
    chance: float
    error: float
    said: tuple[float, ...]
    found: tuple[float, ...]
    counts: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "brier": round(self.brier, 4),
            "brier_of_the_base_rate": round(self.chance, 4),
            "expected_calibration_error": round(self.error, 4),
            "bins": [
                {"said": round(said, 4), "found": round(found, 4), "prompts": count}
                for said, found, count in zip(self.said, self.found, self.counts, strict=True)
            ],
        }


def reliability(scores: np.ndarray, labels: np.ndarray) -> Reliability:
    """Of P(unsafe) (prompts,), in bins of equal width."""
    from sklearn.metrics import brier_score_loss

    place = np.clip((scores * BINS).astype(int), 0, BINS - 1)  # (prompts,)
    counts = np.bincount(place, minlength=BINS)  # (bins,)
    held = counts > 0
    said = np.bincount(place, weights=scores, minlength=BINS)[held] / counts[held]
    found = np.bincount(place, weights=labels, minlength=BINS)[held] / counts[held]
    rate = labels.mean()
    return Reliability(
        float(brier_score_loss(labels, scores)),
        float(rate * (1 - rate)),
        float((np.abs(said - found) * counts[held]).sum() / len(labels)),
        tuple(said.tolist()),
        tuple(found.tolist()),
        tuple(counts[held].tolist()),
    )
