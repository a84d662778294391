"""Calibrate: fit the probe on labelled prompts, and measure what it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sasa_export.calibrate.data import Prompt
from sasa_export.calibrate.features import collect
from sasa_export.calibrate.figure import Figure, figures
from sasa_export.calibrate.platt import Platt, platt
from sasa_export.calibrate.probe import (
    HIGHEST,
    PAPER,
    Fit,
    Probe,
    best_regularization,
    cross_validated,
    fit,
    folded,
    head_metric,
    in_metric,
    in_parts,
    probability,
    threshold_for,
)
from sasa_export.errors import CalibrationError
from sasa_export.graph import LayerGraph
from sasa_export.open.load import head_weight

LEAST_AUC = 0.6  # a probe that ranks hardly better than chance would refuse at random


@dataclass(frozen=True)
class Calibration:
    """The probe, the figures, and the scores of every prompt.

    `cross_validated` and `final` hold P(unsafe) by a probe that did not see the prompt, and by the probe itself.
    `regularization` is the probe's C, `paper` the cross-validated figures of the same features at the paper's C,
    `mapping` what made shares of the scores, where that was wanted; they and the probe have gone through it.
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
    mapping: Platt | None = None


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
    shares: bool = False,
    judged: Sequence[int] | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Calibration:
    """Fit a probe on the lane of `graph` (`rewrite_lane`). CalibrationError where none is usable.

    Each of several lanes has a probe of its own, and the mean of their log odds is that of all. The graph may be one
    without projection, whose probe reads the main lane; then no second lane runs, and there are no
    figures of one. `regularization` is the probe's C; None chooses it by cross-validation, for each feature on its own.
    With `shares`, P(unsafe) is mapped so that it is the share of harmful prompts; verdicts stay.
    Without a `threshold`, `max_false_positive_rate` chooses one. A given one is of P(unsafe) as it is put out.
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
    fit_lanes = in_parts(fit, max(1, len(graph.of("projection"))))

    def scored(features: np.ndarray, fit: Fit) -> tuple[float, np.ndarray]:
        if regularization is None:
            return best_regularization(features, labels, groups, fit=fit)
        return regularization, cross_validated(features, labels, groups, regularization, fit)

    def put_out(scores: np.ndarray) -> tuple[np.ndarray, float, Platt | None]:
        """Scores as the model gives them, the threshold among them, and what mapped them."""
        mapping = platt(scores, labels) if shares else None
        mapped = scores if mapping is None else mapping(scores)
        if threshold is not None:
            return mapped, threshold, mapping
        found = threshold_for(scores, labels, max_false_positive_rate)
        if mapping is not None:
            found = float(np.clip(mapping(np.array([found]))[0], 1 - HIGHEST, HIGHEST))
        return mapped, found, mapping

    chosen, scores = scored(projected, fit_lanes)
    scores, at, mapping = put_out(scores)
    rows = list(range(len(prompts)) if judged is None else judged)
    told = [prompts[row] for row in rows]
    feature = "projected" if graph.of("projection") else "plain"
    found = figures(feature, scores[rows], told, at)
    overall = next(figure for figure in found if figure.channel == "all")
    if feature == "projected":
        plain_scores, plain_at, _ = put_out(scored(in_metric(features.plain, metric), fit)[1])
        found += figures("plain", plain_scores[rows], told, plain_at)
    paper = figures(feature, cross_validated(projected, labels, groups, PAPER, fit_lanes)[rows], told, 0.5)
    _check_usable(overall, threshold, float(scores[rows][labels[rows] == 1].max()))
    weight, bias = fit_lanes(projected, labels, chosen)
    if mapping is not None:
        weight, bias = mapping.probe(weight, bias)
    final = probability(projected, weight, bias)
    probe = Probe(folded(weight, metric).astype(np.float32), bias, at)
    rate = max_false_positive_rate if threshold is None else None
    return Calibration(probe, tuple(found), tuple(prompts), scores, final, rate, chosen, tuple(paper), mapping)


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
