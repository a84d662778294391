"""How far an AUC can be trusted: DeLong's variance, with the prompts of one group counted as one (Obuchowski 1997)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

SPAN = 1.96  # standard errors on either side: 95 %

Key = TypeVar("Key")


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval, and its influence: how much each group of prompts adds to it, (groups,)."""

    value: float
    low: float
    high: float
    influence: np.ndarray

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def auc_of(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> Estimate:
    """The area under the ROC curve of scores (prompts,) for labels 0 and 1."""
    harmful, harmless = np.sort(scores[labels == 1]), np.sort(scores[labels == 0])
    influence = np.zeros(len(scores))
    # For a harmful prompt the share of harmless ones below it, for a harmless one that of harmful ones above it.
    below = (np.searchsorted(harmless, scores, "left") + np.searchsorted(harmless, scores, "right")) / 2
    above = len(harmful) - (np.searchsorted(harmful, scores, "left") + np.searchsorted(harmful, scores, "right")) / 2
    value = float(below[labels == 1].mean() / len(harmless))
    influence[labels == 1] = (below[labels == 1] / len(harmless) - value) / len(harmful)
    influence[labels == 0] = (above[labels == 0] / len(harmful) - value) / len(harmless)
    return _estimate(value, influence, groups, 0.0, 1.0)


def mean_of(values: np.ndarray, groups: np.ndarray) -> Estimate:
    """The mean of values (prompts,)."""
    value = float(values.mean())
    return _estimate(value, (values - value) / len(values), groups, -np.inf, np.inf)


def is_below(lower: Estimate, higher: Estimate, among: int = 1) -> bool:
    """Is the first figure below the second by more than noise? Both must be of the same prompts.

    `among` is the number of figures that the higher one is the best of: the best of many is partly luck, so that a
    difference counts only where it would be seen in one of twenty such comparisons by chance (Bonferroni).
    """
    from scipy.stats import norm

    span = float(norm.isf(0.025 / among))
    # A difference of rounding alone is none, however small the noise.
    return bool(higher.value - lower.value > span * _error(higher.influence - lower.influence) + 1e-9)


def best(estimates: Mapping[Key, Estimate]) -> Key:
    """The key of the highest figure, the first of equals."""
    return max(estimates, key=lambda key: estimates[key].value)


def within_noise(estimates: Mapping[Key, Estimate]) -> list[Key]:
    """The keys of the figures that are not below the best one by more than noise, in order."""
    highest = estimates[best(estimates)]
    return [key for key, estimate in estimates.items() if not is_below(estimate, highest, len(estimates))]


def _estimate(value: float, influence: np.ndarray, groups: np.ndarray, least: float, most: float) -> Estimate:
    _, index = np.unique(groups, return_inverse=True)
    by_group = np.bincount(index, weights=influence)  # (groups,)
    error = SPAN * _error(by_group)
    return Estimate(value, max(least, value - error), min(most, value + error), by_group)


def _error(by_group: np.ndarray) -> float:
    count = len(by_group)
    return float(np.sqrt((by_group**2).sum() * count / max(count - 1, 1)))
