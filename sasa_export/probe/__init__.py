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
from sasa_export.probe.figures import Figure, KindFigure, figures, kind_figures
from sasa_export.probe.fit import (
    CANDIDATES,
    Probe,
    best_regularization,
    fit,
    head_metric,
    in_metric,
    probability,
    threshold_of,
)
from sasa_export.probe.folds import folds_of, kinds_of
from sasa_export.probe.words import best_words
from sasa_export.prompts.prompt import Prompt

LEAST_AUC = 0.6  # a probe that ranks hardly better than chance would refuse at random


@dataclass(frozen=True)
class Fitted:
    """Probes before a threshold is chosen: of the "projected" lane, where there is one, and of the "plain" main lane.

    The first is the one that is made. `scores` holds cross-validated P(unsafe) of each, (prompts,), and of "words",
    where kinds were left out; `final` (prompts,) is that of the first probe itself.
    """

    probes: dict[str, tuple[np.ndarray, float]]  # weight (features,), float32, and bias
    regularization: float
    scores: dict[str, np.ndarray]
    final: np.ndarray


@dataclass(frozen=True)
class Calibration:
    """The probe, the figures, and the scores of every prompt.

    `cross_validated` and `final` (prompts,) hold P(unsafe) by a probe that saw nothing of the prompt's kind (or group:
    `folds_of`), and by the probe itself. `kinds` are the figures by kind, where kinds were left out. `regularization`
    is the probe's C. `max_false_positive_rate` is what chose the threshold; None where it was given.
    """

    probe: Probe
    figures: tuple[Figure, ...]
    kinds: tuple[KindFigure, ...]
    prompts: tuple[Prompt, ...]
    cross_validated: np.ndarray
    final: np.ndarray
    max_false_positive_rate: float | None
    regularization: float


def calibrate(
    model: Any,
    processor: Any,
    graph: LayerGraph,
    prompts: Sequence[Prompt],
    *,
    batch_size: int,
    regularization: float | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Fitted:
    """Fit a probe on the lane of `graph` (`rewrite_lane`).

    Args:
        graph: where it has no projection, the probe reads the main lane.
        regularization: the probe's C; None chooses it by cross-validation, for each feature on its own.
        advance: called with the number of prompts done since the last call.
    """
    features = collect(model, processor, graph, prompts, batch_size=batch_size, advance=advance)
    lanes = {"plain": features.projected}  # without a projection, what the probe reads is the main lane's end
    if graph.of("projection"):
        lanes = {"projected": features.projected, "plain": features.plain}
    metric = None if graph.of("lane_head") else head_metric(head_weight(model))
    return fit_probes(lanes, prompts, metric, regularization)


def fit_probes(
    features: dict[str, np.ndarray],
    prompts: Sequence[Prompt],
    metric: np.ndarray | None,
    regularization: float | None = None,
) -> Fitted:
    """Probes on features (prompts, features), by lane, in the head's metric (`head_metric`)."""
    lanes = {name: in_metric(states, metric) for name, states in features.items()}
    labels, folds = np.array([prompt.label for prompt in prompts]), folds_of(prompts)
    candidates = CANDIDATES if regularization is None else (regularization,)
    chosen = {name: best_regularization(states, labels, folds, candidates) for name, states in lanes.items()}
    scores = {name: found for name, (_, found) in chosen.items()}
    if kinds_of(prompts) is not None:
        scores["words"] = best_words(prompts, folds)[1]
    probes, final, read = {}, {}, next(iter(lanes))
    for name, states in lanes.items():
        weight, bias = fit(states, labels, chosen[name][0])
        # The fitted weight v reads features in the metric R, the probe reads them as they are: w . h = (R^T v) . h.
        probes[name] = ((weight if metric is None else weight @ metric).astype(np.float32), bias)
        final[name] = probability(states, weight, bias)
    return Fitted(probes, chosen[read][0], scores, final[read])


def with_threshold(
    fitted: Fitted,
    prompts: Sequence[Prompt],
    *,
    max_false_positive_rate: float,
    max_borderline_rate: float | None = None,
    threshold: float | None = None,
    judged: Sequence[int] | None = None,
) -> Calibration:
    """The probe with its threshold, and what it does there. CalibrationError where it is of no use.

    Args:
        max_false_positive_rate: chooses the threshold, with `max_borderline_rate`, unless there is a `threshold`.
        judged: the rows of the prompts that the figures are of, where others took part in choosing the layers.
    """
    rows = list(range(len(prompts)) if judged is None else judged)
    shown, kinds = [prompts[row] for row in rows], kinds_of(prompts)
    limits: dict[str, float] = {}
    found: list[Figure] = []
    for name in ("projected", "plain"):
        if name in fitted.scores:
            scores = fitted.scores[name]
            limits[name] = threshold or threshold_of(scores, prompts, max_false_positive_rate, max_borderline_rate)
            found += figures(name, scores[rows], shown, limits[name])
    read = next(iter(limits))
    harmful = [row for row in rows if prompts[row].label == 1]
    _check_usable(found[0], threshold, float(fitted.scores[read][harmful].max()))
    by_kind: Sequence[KindFigure] = ()
    if kinds is not None:
        by_kind = kind_figures(shown, kinds[rows], {name: values[rows] for name, values in fitted.scores.items()})
    return Calibration(
        Probe(*fitted.probes[read], limits[read]), tuple(found), tuple(by_kind), tuple(prompts),
        fitted.scores[read], fitted.final, max_false_positive_rate if threshold is None else None,
        fitted.regularization,
    )  # fmt: skip


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
