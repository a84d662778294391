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
    PAPER,
    Probe,
    best_regularization,
    cross_validated,
    fit,
    folded,
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

    `cross_validated` and `final` hold P(unsafe) by a probe that did not see the prompt, and by the probe itself.
    `regularization` is the probe's C, `paper` the cross-validated figures of the same features at the paper's C,
    `max_false_positive_rate` is what chose the threshold; None where it was given.
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

    The graph may be one without projection, whose probe reads the main lane; then no second lane runs, and there are no
    figures of one. `regularization` is the probe's C; None chooses it by cross-validation, for each feature on its own.
    Without a `threshold`, `max_false_positive_rate` chooses one.
    `judged` are the numbers of the prompts that the figures are of, where others took part in choosing the layers.
    """
    features = collect(model, processor, graph, prompts, batch_size=batch_size, advance=advance)
    labels = np.array([prompt.label for prompt in prompts])
    groups = [prompt.group for prompt in prompts]
    if graph.of("lane_head"):
        metric = None
    else:
        metric = head_metric(head_weight(model))
    projected = in_metric(features.projected, metric)  # without projection, the main lane's end

    def scored(features: np.ndarray) -> tuple[float, np.ndarray]:
        if regularization is None:
            return best_regularization(features, labels, groups)
        return regularization, cross_validated(features, labels, groups, regularization)

    def limit(scores: np.ndarray) -> float:
        return threshold_for(scores, labels, max_false_positive_rate) if threshold is None else threshold

    chosen, scores = scored(projected)
    at = limit(scores)
    rows = list(range(len(prompts)) if judged is None else judged)
    told = [prompts[row] for row in rows]
    feature = "projected" if graph.of("projection") else "plain"
    found = figures(feature, scores[rows], told, at)
    overall = next(figure for figure in found if figure.channel == "all")
    if feature == "projected":
        plain_scores = scored(in_metric(features.plain, metric))[1]
        found += figures("plain", plain_scores[rows], told, limit(plain_scores))
    paper = figures(feature, cross_validated(projected, labels, groups, PAPER)[rows], told, 0.5)
    _check_usable(overall, threshold, float(scores[rows][labels[rows] == 1].max()))
    weight, bias = fit(projected, labels, chosen)
    final = probability(projected, weight, bias)
    probe = Probe(folded(weight, metric).astype(np.float32), bias, at)
    rate = max_false_positive_rate if threshold is None else None
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
