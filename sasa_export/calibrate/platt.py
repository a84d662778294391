"""Probabilities that are shares: P(unsafe) mapped by two numbers, so that of prompts at 0.3 about 30 % are harmful.

Platt, "Probabilistic outputs for support vector machines", 1999. The order of the prompts stays as it was.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sasa_export.errors import CalibrationError

EDGE = 1e-6  # probabilities are kept so far from 0 and 1 where their log-odds are taken


@dataclass(frozen=True)
class Platt:
    """P -> sigmoid(slope * log-odds(P) + offset)."""

    slope: float
    offset: float

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Scores (prompts,) as shares (prompts,)."""
        from scipy.special import expit

        return expit(self.slope * log_odds(scores) + self.offset)

    def probe(self, weight: np.ndarray, bias: float) -> tuple[np.ndarray, float]:
        """The weight (features,) and bias of a probe that gives shares by itself."""
        return self.slope * weight, self.slope * bias + self.offset


def platt(scores: np.ndarray, labels: np.ndarray) -> Platt:
    """Fit the two numbers to scores (prompts,) of prompts that the probe did not see, and their labels (prompts,).

    CalibrationError where higher scores do not mean more harmful prompts.
    """
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1e6).fit(log_odds(scores)[:, None], labels)
    slope = float(model.coef_[0, 0])
    if slope <= 0:
        raise CalibrationError(
            "higher scores do not mean more harmful prompts here, so there are no probabilities to calibrate. Give "
            "--probabilities raw, or more calibration data."
        )
    return Platt(slope, float(model.intercept_[0]))


def log_odds(scores: np.ndarray) -> np.ndarray:
    """(prompts,) -> (prompts,)."""
    inside = np.clip(scores, EDGE, 1 - EDGE)
    return np.log(inside / (1 - inside))
