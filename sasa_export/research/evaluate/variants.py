"""What else a probe could read of the same prompts, and whether it wins: measured against the probe with projection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sasa_export.probe.platt import platt
from sasa_export.prompts.prompt import Prompt
from sasa_export.research.evaluate.compare import difference
from sasa_export.research.evaluate.detection import detection
from sasa_export.research.evaluate.features import Features
from sasa_export.research.evaluate.fitted import Fitted, probe
from sasa_export.research.evaluate.reliability import Reliability, reliability
from sasa_export.research.evaluate.shares import Interval

LAST_TOKENS = 4


@dataclass(frozen=True)
class Variant:
    """A probe on other features. `gain` is its AUC less that of the probe with projection, and `over_plain` less that
    of the one without, all fitted alike."""

    name: str
    auc: Interval
    recall_at_rate: Interval
    gain: Interval
    over_plain: Interval

    @property
    def wins(self) -> bool:
        """Is it better than both by more than noise?"""
        return self.gain.low > 0 and self.over_plain.low > 0

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "auc": self.auc.to_json(),
            "recall_at_rate": self.recall_at_rate.to_json(),
            "auc_gained": self.gain.to_json(),
            "auc_gained_over_no_projection": self.over_plain.to_json(),
        }


@dataclass(frozen=True)
class Calibrated:
    """P(unsafe) of the probe with projection as it is, and mapped to shares found in calibration (Platt)."""

    before: Reliability
    after: Reliability

    def to_json(self) -> dict[str, Any]:
        return {"before": self.before.to_json(), "after": self.after.to_json()}


def variants(
    calibration: Features,
    evaluation: Features,
    in_metric: Callable[[np.ndarray], np.ndarray],
    fitted_on: Sequence[Prompt],
    prompts: Sequence[Prompt],
    base: Fitted,
    plain: Fitted,
    rate: float,
    regularization: float | None,
) -> tuple[Variant, ...]:
    """Fit and measure each variant on features (prompts, features); `base` is the probe with projection,
    `plain` without.

    `in_metric` measures features as calibration does, `rate` is the chosen false-positive rate.
    """
    sides = (calibration, evaluation)
    wanted: dict[str, list[np.ndarray]] = {
        "the ends of both lanes": [
            np.concatenate([in_metric(side.plain), in_metric(side.projected)], axis=1) for side in sides
        ]
    }
    means = [side.recent for side in sides]
    if means[0] is not None and means[1] is not None:
        wanted[f"the mean over the last {LAST_TOKENS} tokens"] = [in_metric(mean) for mean in means if mean is not None]
    labels = np.array([prompt.label for prompt in prompts])
    groups = [prompt.group for prompt in prompts]
    found = []
    for name, (before, after) in wanted.items():
        fitted = probe(before, after, fitted_on, rate, regularization)
        threshold = 1.0 if fitted.threshold is None else fitted.threshold
        figures = detection(fitted.scores, fitted.scores >= threshold, labels, groups, rate)
        assert figures is not None  # both labels are there, or the evaluation would have stopped
        gains = [difference(fitted.scores, other.scores, labels, groups) for other in (base, plain)]
        found.append(Variant(name, figures.auc, figures.recall_at_rate, *gains))
    return tuple(found)


def calibrated(base: Fitted, fitted_on: Sequence[Prompt], prompts: Sequence[Prompt]) -> Calibrated:
    """Map P(unsafe) by two numbers that fit the cross-validated scores of the calibration prompts (Platt 1999)."""
    labels = np.array([prompt.label for prompt in prompts])
    mapping = platt(base.held_out, np.array([prompt.label for prompt in fitted_on]))
    return Calibrated(reliability(base.scores, labels), reliability(mapping(base.scores), labels))
