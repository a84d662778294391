"""Figures with 95 % intervals: Wilson's for shares, and for areas and means DeLong's variance with the prompts of one
group counted as one (Obuchowski 1997), by which figures of the same prompts compare.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np

CONFIDENCE = 0.95
SPAN = 1.96  # standard errors on either side

Key = TypeVar("Key")


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval. It is written as `form` says, or with another one: `f"{estimate:+.3f}"`."""

    value: float
    low: float
    high: float
    form: ClassVar[str] = ".3f"

    def __format__(self, form: str) -> str:
        form = form or self.form
        return f"{self.value:{form}} ({self.low:{form}} to {self.high:{form}})"

    def __str__(self) -> str:
        return format(self)

    @property
    def short(self) -> str:
        """The figure alone."""
        return format(self.value, self.form)


@dataclass(frozen=True)
class Share(Estimate):
    """The share that `count` of `total` prompts are."""

    count: int
    total: int
    form: ClassVar[str] = ".1%"


@dataclass(frozen=True)
class Comparable(Estimate):
    """A figure with its influence, (groups,): how much each group of prompts adds to it."""

    influence: np.ndarray


def share(flags: np.ndarray) -> Share | None:
    """The share of flags (prompts,), bool, that hold, with Wilson's interval; None where there are no prompts."""
    return wilson(int(flags.sum()), len(flags)) if len(flags) else None


def wilson(count: int, total: int) -> Share:
    """The share that `count` of `total` prompts are, with Wilson's interval."""
    from scipy.stats import binomtest

    interval = binomtest(count, total).proportion_ci(CONFIDENCE, method="wilson")
    return Share(count / total, float(interval.low), float(interval.high), count, total)


def is_above(higher: Share, lower: Share) -> bool:
    """Is a share above one of other prompts by more than noise (Newcombe 1998, method 10)?"""
    return higher.value - lower.value > np.hypot(higher.value - higher.low, lower.high - lower.value)


def auc_of(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> Comparable:
    """The area under the ROC curve of scores (prompts,) for labels 0 and 1."""
    harmful, harmless = np.sort(scores[labels == 1]), np.sort(scores[labels == 0])
    influence = np.zeros(len(scores))
    # For a harmful prompt the share of harmless ones below it, for a harmless one that of harmful ones above it.
    below = (np.searchsorted(harmless, scores, "left") + np.searchsorted(harmless, scores, "right")) / 2
    above = len(harmful) - (np.searchsorted(harmful, scores, "left") + np.searchsorted(harmful, scores, "right")) / 2
    value = float(below[labels == 1].mean() / len(harmless))
    influence[labels == 1] = (below[labels == 1] / len(harmless) - value) / len(harmful)
    influence[labels == 0] = (above[labels == 0] / len(harmful) - value) / len(harmless)
    return _comparable(value, influence, groups, 0.0, 1.0)


def mean_of(values: np.ndarray, groups: np.ndarray) -> Comparable:
    """The mean of values (prompts,)."""
    value = float(values.mean())
    return _comparable(value, (values - value) / len(values), groups, -np.inf, np.inf)


def difference(first: Comparable, second: Comparable) -> Comparable:
    """The first figure less the second; both must be of the same prompts."""
    influence = first.influence - second.influence  # (groups,)
    value, error = first.value - second.value, SPAN * _error(influence)
    return Comparable(value, value - error, value + error, influence)


def is_below(lower: Comparable, higher: Comparable, among: int = 1) -> bool:
    """Is the first figure below the second by more than noise? Both must be of the same prompts.

    `among` is the number of figures that the higher one is the best of: the best of many is partly luck, so that a
    difference counts only where it would be seen in one of twenty such comparisons by chance (Bonferroni).
    """
    from scipy.stats import norm

    span = float(norm.isf(0.025 / among))
    # A difference of rounding alone is none, however small the noise.
    return bool(higher.value - lower.value > span * _error(higher.influence - lower.influence) + 1e-9)


def best(estimates: Mapping[Key, Comparable]) -> Key:
    """The key of the highest figure, the first of equals."""
    return max(estimates, key=lambda key: estimates[key].value)


def within_noise(estimates: Mapping[Key, Comparable]) -> list[Key]:
    """The keys of the figures that are not below the best one by more than noise, in order."""
    highest = estimates[best(estimates)]
    return [key for key, estimate in estimates.items() if not is_below(estimate, highest, len(estimates))]


def _comparable(value: float, influence: np.ndarray, groups: np.ndarray, least: float, most: float) -> Comparable:
    _, index = np.unique(groups, return_inverse=True)
    by_group = np.bincount(index, weights=influence)  # (groups,)
    error = SPAN * _error(by_group)
    return Comparable(value, max(least, value - error), min(most, value + error), by_group)


def _error(by_group: np.ndarray) -> float:
    count = len(by_group)
    return float(np.sqrt((by_group**2).sum() * count / max(count - 1, 1)))
