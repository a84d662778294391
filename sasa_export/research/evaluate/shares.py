"""Shares of prompts with Wilson's interval, and figures with an interval from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Share:
    """`count` of `total` prompts, with the 95 % interval of Wilson (each prompt counted on its own)."""

    count: int
    total: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.count / self.total

    def to_json(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "total": self.total,
            "value": round(self.value, 4),
            "low": round(self.low, 4),
            "high": round(self.high, 4),
        }


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in vars(self).items()}


def share(flags: np.ndarray) -> Share | None:
    """The share of flags (prompts,), bool, that hold; None where there are none."""
    from scipy.stats import binomtest

    if not len(flags):
        return None
    count = int(flags.sum())
    interval = binomtest(count, len(flags)).proportion_ci(CONFIDENCE, method="wilson")
    return Share(count, len(flags), float(interval.low), float(interval.high))
