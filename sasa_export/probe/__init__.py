"""Calibrate: fit the probe on labelled prompts, and measure what it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sasa_export.errors import CalibrationError
from sasa_export.graph import LayerGraph
from sasa_export.models.load import head_weight
from sasa_export.probe.features import collect
from sasa_export.probe.figures import Figure, figures
from sasa_export.probe.fit import (
    CANDIDATES,
    PAPER,
    Probe,
    best_regularization,
    cross_validated,
    fit,
    head_metric,
    in_metric,
    probability,
    threshold_for,
)
from sasa_export.prompts.prompt import Prompt

LEAST_AUC = 0.6  # a probe that ranks hardly better than chance would refuse at random


@dataclass(frozen=True)
class Calibration:
    """The probe, the figures, and the scores of every prompt.

    `cross_validated` and `final` (prompts,) hold P(unsafe) by a probe that did not see the prompt, and by the probe
    itself. `regularization` is the probe's C, `paper` holds the cross-validated figures of the same features at the
    paper's C. `max_false_positive_rate` is what chose the threshold; None where it was given.
    """

    probe: Probe
    figures: tuple[Figure, ...]
    prompts: tuple[Prompt, ...]
    cross_validated: np.ndarray
    final: np.ndarray
    max_false_positive_rate: float | None
    regularization: float
    paper: tuple[Figure, ...]


def calibrate(
    model: Any,
    processor: Any,
    graph: LayerGraph,
    prompts: Sequence[Prompt],
    *,
    batch_size: int,
    max_false_positive_rate: float,
    threshold: float | None = None,
    regularization: float | None = None,
    judged: Sequence[int] | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Calibration:
    """Fit a probe on the lane of `graph` (`rewrite_lane`). CalibrationError where none is usable.

    Args:
        graph: where it has no projection, the probe reads the main lane, and there are no figures of a second one.
        max_false_positive_rate: chooses the threshold, unless there is a `threshold`.
        regularization: the probe's C; None chooses it by cross-validation, for each feature on its own.
        judged: the rows of the prompts that the figures are of, where others took part in choosing the layers.
        advance: called with the number of prompts done since the last call.
    """
    features = collect(model, processor, graph, prompts, batch_size=batch_size, advance=advance)
    labels, groups = np.array([prompt.label for prompt in prompts]), [prompt.group for prompt in prompts]
    rows = list(range(len(prompts)) if judged is None else judged)
    metric = None if graph.of("lane_head") else head_metric(head_weight(model))
    candidates = CANDIDATES if regularization is None else (regularization,)

    def measured(feature: str, scores: np.ndarray, at: float | None) -> tuple[float, list[Figure]]:
        """The threshold, and the figures there."""
        limit = threshold_for(scores, labels, max_false_positive_rate) if at is None else at
        return limit, figures(feature, scores[rows], [prompts[row] for row in rows], limit)

    feature = "projected" if graph.of("projection") else "plain"
    states = in_metric(features.projected, metric)  # (prompts, features)
    chosen, scores = best_regularization(states, labels, groups, candidates)
    limit, found = measured(feature, scores, threshold)
    _check_usable(found[-1], threshold, float(scores[rows][labels[rows] == 1].max()))
    if feature == "projected":
        plain = best_regularization(in_metric(features.plain, metric), labels, groups, candidates)[1]
        found += measured("plain", plain, threshold)[1]
    paper = measured(feature, cross_validated(states, labels, groups, PAPER), 0.5)[1]
    weight, bias = fit(states, labels, chosen)
    # The fitted weight v reads features in the metric R, and the probe reads them as they are: w . h = (R^T v) . h.
    probe = Probe((weight if metric is None else weight @ metric).astype(np.float32), bias, limit)
    rate = max_false_positive_rate if threshold is None else None
    final = probability(states, weight, bias)
    return Calibration(probe, tuple(found), tuple(prompts), scores, final, rate, chosen, tuple(paper))


def _check_usable(overall: Figure, threshold: float | None, highest: float) -> None:
    """CalibrationError where the gate would refuse nothing, or hardly anything but by chance.

    Args: threshold: the one that was given, if any; highest: P(unsafe) of the harmful prompts.
    """
    if overall.recall == 0.0 and threshold is not None:
        raise CalibrationError(
            f"no harmful calibration prompt reaches --threshold {threshold:g}, so the gate would refuse nothing. "
            f"The highest has P(unsafe) {highest:.3f}: choose a lower one, or none."
        )
    if not overall.auc >= LEAST_AUC or overall.recall == 0.0:
        where, other = "on these layers", "other --safety-layer and --semantic-layer"
        if overall.feature == "plain":
            where, other = "without projection", "--projection semantic"
        raise CalibrationError(
            f"no usable probe: {where} harmful and harmless prompts are hardly separable (AUC {overall.auc:.3f}, "
            f"{overall.recall:.0%} of the harmful ones caught at a false-positive rate of "
            f"{overall.false_positive_rate:.1%}). Try {other}, more calibration data, or a higher "
            "--max-false-positive-rate."
        )
