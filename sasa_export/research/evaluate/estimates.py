"""Figures with 95 % intervals: Wilson's for shares, and a bootstrap of whole groups for all else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

CONFIDENCE = 0.95
DRAWS = 1000
AT_ONCE = 2_000_000  # weights in memory at a time


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


def share(flags: np.ndarray) -> Share | None:
    """The share of flags (prompts,), bool, that hold, with Wilson's interval; None where there are no prompts."""
    from scipy.stats import binomtest

    if not len(flags):
        return None
    count = int(flags.sum())
    interval = binomtest(count, len(flags)).proportion_ci(CONFIDENCE, method="wilson")
    return Share(count / len(flags), float(interval.low), float(interval.high), count, len(flags))


def bootstrap(measure: Callable[[np.ndarray], np.ndarray], groups: Sequence[str]) -> Estimate:
    """A figure of prompts, and how it varies when whole groups are drawn again with replacement.

    Args:
        measure: from weights (draws, prompts), how often each prompt counts, to figures (draws,).
        groups: of each prompt. Equal groups give equal draws, so differences of figures are paired.
    """
    value = measure(np.ones((1, len(groups))))[0]
    drawn = np.concatenate([measure(weights) for weights in resamples(groups)])  # (DRAWS,)
    low, high = np.nanquantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(float(value), float(low), float(high))


def resamples(groups: Sequence[str]) -> Iterator[np.ndarray]:
    """How often each prompt is drawn, (draws, prompts), in parts of bounded memory, 1000 draws in all."""
    _, index = np.unique(np.asarray(groups), return_inverse=True)  # (prompts,)
    count = int(index.max()) + 1
    draw = np.random.default_rng(0)
    size = max(1, AT_ONCE // len(index))
    for done in range(0, DRAWS, size):
        yield draw.multinomial(count, np.full(count, 1 / count), size=min(size, DRAWS - done))[:, index]


def auc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The area under the ROC curve of scores (prompts,), (draws,); NaN where a draw has one label alone."""
    harmful, harmless = _by_score(scores, labels, weights)  # (draws, steps)
    above = harmful.cumsum(1) - harmful / 2  # (draws, steps), ties count half
    with np.errstate(invalid="ignore"):
        return (above * harmless).sum(1) / (harmful.sum(1) * harmless.sum(1))


def recall_at(rate: float, scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The largest share of harmful prompts that any threshold catches on these very prompts at a false-positive rate
    of at most `rate`, (draws,); NaN where a draw has no harmless ones."""
    harmful, harmless = _by_score(scores, labels, weights)  # (draws, steps)
    with np.errstate(invalid="ignore"):
        caught = harmful.cumsum(1) / harmful.sum(1, keepdims=True)  # (draws, steps)
        wrong = harmless.cumsum(1) / harmless.sum(1, keepdims=True)  # (draws, steps)
    found = np.where(wrong <= rate + 1e-12, caught, 0.0).max(1)  # (draws,)
    return np.where(np.isnan(wrong[:, -1]), np.nan, found)


def f1(flagged: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The harmonic mean of precision and recall, (draws,); 0 where nothing harmful is caught."""
    right = weights @ (flagged & (labels == 1)).astype(float)  # (draws,)
    either = weights @ (flagged.astype(float) + labels)  # (draws,)
    return np.divide(2 * right, either, out=np.zeros(len(weights)), where=either > 0)


def _by_score(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weight of harmful and of harmless prompts at each distinct score, the highest first, both (draws, steps)."""
    order = np.argsort(-scores, kind="stable")  # (prompts,)
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])  # (steps,), where a new score begins
    ordered = weights[:, order].astype(float)  # (draws, prompts)
    harmful = labels[order] == 1  # (prompts,)
    return (
        np.add.reduceat(ordered * harmful, starts, axis=1),
        np.add.reduceat(ordered * ~harmful, starts, axis=1),
    )
