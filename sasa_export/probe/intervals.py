"""Figures with 95 % intervals. Shares have Wilson's interval. AUCs and means have DeLong's variance, which can also
compare figures of the same prompts. The prompts of one group count as one (Obuchowski 1997).
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
    """A figure with its interval. `form` is the default format; `f"{estimate:+.3f}"` gives another."""

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
        """Return the figure without its interval."""
        return format(self.value, self.form)


@dataclass(frozen=True)
class Share(Estimate):
    """The share of `count` in `total` prompts."""

    count: int
    total: int
    form: ClassVar[str] = ".1%"


@dataclass(frozen=True)
class Comparable(Estimate):
    """A figure with its influence, (groups,): each group's contribution to the figure."""

    influence: np.ndarray


def share(flags: np.ndarray) -> Share | None:
    """Return the share of true flags (prompts,), bool, with Wilson's interval. None without prompts."""
    return wilson(int(flags.sum()), len(flags)) if len(flags) else None


def wilson(count: int, total: int) -> Share:
    """Return the share of `count` in `total` prompts, with Wilson's interval."""
    from scipy.stats import binomtest

    interval = binomtest(count, total).proportion_ci(CONFIDENCE, method="wilson")
    return Share(count / total, float(interval.low), float(interval.high), count, total)


def is_above(higher: Share, lower: Share) -> bool:
    """Return whether a share is above a share of other prompts, beyond noise (Newcombe 1998, method 10)."""
    return higher.value - lower.value > np.hypot(higher.value - higher.low, lower.high - lower.value)


def auc_of(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> Comparable:
    """Return the area under the ROC curve (AUC) of scores (prompts,) for labels 0 and 1."""
    harmful, harmless = np.sort(scores[labels == 1]), np.sort(scores[labels == 0])
    influence = np.zeros(len(scores))
    # For each score, the numbers of harmless scores below it and of harmful scores above it. Ties count half.
    below = (np.searchsorted(harmless, scores, "left") + np.searchsorted(harmless, scores, "right")) / 2
    above = len(harmful) - (np.searchsorted(harmful, scores, "left") + np.searchsorted(harmful, scores, "right")) / 2
    value = float(below[labels == 1].mean() / len(harmless))
    influence[labels == 1] = (below[labels == 1] / len(harmless) - value) / len(harmful)
    influence[labels == 0] = (above[labels == 0] / len(harmful) - value) / len(harmless)
    return _comparable(value, influence, groups, 0.0, 1.0)


def mean_of(values: np.ndarray, groups: np.ndarray) -> Comparable:
    """Return the mean of values (prompts,)."""
    value = float(values.mean())
    return _comparable(value, (values - value) / len(values), groups, -np.inf, np.inf)


def difference(first: Comparable, second: Comparable) -> Comparable:
    """Return the first figure minus the second. Both must be of the same prompts."""
    influence = first.influence - second.influence  # (groups,)
    value, error = first.value - second.value, SPAN * _error(influence)
    return Comparable(value, value - error, value + error, influence)


def is_below(lower: Comparable, higher: Comparable, among: int = 1) -> bool:
    """Return whether the first figure is below the second, beyond noise. Both must be of the same prompts.

    `higher` may be the best of `among` figures. The best of many is partly luck. A difference therefore counts only if
    chance would show it in no more than one of twenty such comparisons (Bonferroni).
    """
    from scipy.stats import norm

    span = float(norm.isf(0.025 / among))
    # Ignore rounding differences, however small the noise.
    return bool(higher.value - lower.value > span * _error(higher.influence - lower.influence) + 1e-9)


def best(estimates: Mapping[Key, Comparable]) -> Key:
    """Return the key of the highest figure, the first among equals."""
    return max(estimates, key=lambda key: estimates[key].value)


def within_noise(estimates: Mapping[Key, Comparable]) -> list[Key]:
    """Return the keys, in order, of the figures that are not below the best one beyond noise."""
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
