"""Calibrate: fit the probe on labelled prompts, and measure what it does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sasa_export.errors import CalibrationError
from sasa_export.graph import LayerGraph
from sasa_export.models.load import head_weight
from sasa_export.probe.channels import CHANNELS, MARKS, Detector, Linear, detector, lowered, offsets
from sasa_export.probe.features import Features
from sasa_export.probe.figures import Figure, KindFigure, figures, kind_figures
from sasa_export.probe.fit import (
    CANDIDATES,
    Probe,
    best_regularization,
    best_words,
    fit,
    head_metric,
    in_metric,
    probability,
    steady_metric,
    threshold_of,
)
from sasa_export.probe.folds import folds_of, kinds_of
from sasa_export.prompts.prompt import Prompt

RATES = (0.005, 0.01, 0.02, 0.05, 0.1)  # of ordinary prompts refused, in the card's table of thresholds
LEAST_AUC = 0.6  # a probe that ranks hardly better than chance would refuse at random
ENOUGH = "A probe takes hundreds of prompts of either label: --calibration builtin beside yours adds the built-in set"


@dataclass(frozen=True)
class Fitted:
    """Probes before a threshold is chosen: of the "projected" lane, where there is one, and of the "plain" main lane.

    The first is the one that is made. `scores` holds cross-validated P(unsafe) of each, (prompts,), and of "words",
    where kinds were left out; `final` (prompts,) is that of the first probe itself. `detectors` tell pictures and
    long text on the same features, and `detected` holds what they put out, (prompts, marks) each (`channels`).
    """

    probes: dict[str, Linear]
    detectors: dict[str, Detector]
    detected: dict[str, np.ndarray]
    regularization: float
    scores: dict[str, np.ndarray]
    final: np.ndarray


@dataclass(frozen=True)
class Calibration:
    """The probe, the figures, and the scores of every prompt.

    `cross_validated` and `final` (prompts,) hold P(unsafe) by a probe that saw nothing of the prompt's kind (or group:
    `folds_of`), and by the probe itself. `kinds` are the figures of text by kind, where kinds were left out.
    `regularization` is the probe's C. `max_false_positive_rate` is what chose the threshold; None where it was given.
    """

    probe: Probe
    figures: tuple[Figure, ...]
    kinds: tuple[KindFigure, ...]
    prompts: tuple[Prompt, ...]
    cross_validated: np.ndarray
    final: np.ndarray
    max_false_positive_rate: float | None
    regularization: float

    def warnings(self) -> list[str]:
        """A sentence on each channel, text or picture, in which the probe that was made is worth nothing."""
        return [
            f"{figure.part} prompts: {figure.refused}, which may be chance. Do not rely on the gate there: give more "
            "calibration prompts of that kind."
            for figure in self.figures
            if figure.feature == self.figures[0].feature and figure.part in CHANNELS and not figure.beats_chance
        ]

    def trade_off(self) -> list[tuple[float, Figure]]:
        """Other thresholds, each with what it would do: those that refuse so many of the ordinary prompts (`RATES`)."""
        thresholds = (threshold_of(self.cross_validated, self.prompts, rate) for rate in RATES)
        name = self.figures[0].feature
        return [(at, figures(name, self.cross_validated, self.prompts, at)[0]) for at in thresholds]


def calibrate(
    model: Any, graph: LayerGraph, features: Features, prompts: Sequence[Prompt], regularization: float | None = None
) -> Fitted:
    """Fit a probe on what the lane of `graph` (`rewrite_lane`) made of the prompts.

    Args:
        graph: where it has no projection, the probe reads the main lane.
        regularization: the probe's C; None chooses it by cross-validation, for each feature on its own.
    """
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
    metrics = {name: metric_of(states, prompts, metric) for name, states in features.items()}
    lanes = {name: in_metric(states, metrics[name]) for name, states in features.items()}
    labels, folds = np.array([prompt.label for prompt in prompts]), folds_of(prompts)
    candidates = CANDIDATES if regularization is None else (regularization,)
    chosen = {name: best_regularization(states, labels, folds, candidates) for name, states in lanes.items()}
    scores = {name: found for name, (_, found) in chosen.items()}
    if kinds_of(prompts) is not None:
        scores["words"] = best_words(prompts, folds)[1]

    def folded(name: str, found: Any) -> Any:
        # The fitted weight v reads features in the metric R, the probe reads them as they are: w . h = (R^T v) . h.
        used = metrics[name]
        return found[0] if used is None else found[0] @ used, found[1]

    probes = {name: fit(states, labels, chosen[name][0]) for name, states in lanes.items()}
    marks = {name: detector(states, prompts) for name, states in lanes.items()}
    read = next(iter(lanes))
    return Fitted(
        {name: folded(name, found) for name, found in probes.items()},
        {name: folded(name, found) for name, found in marks.items()},
        {name: lanes[name] @ weight.T + bias for name, (weight, bias) in marks.items()},
        chosen[read][0],
        scores,
        probability(lanes[read], *probes[read]),
    )


def metric_of(states: np.ndarray, prompts: Sequence[Prompt], metric: np.ndarray | None) -> np.ndarray | None:
    """The head's metric, for each of the normed states that lie side by side, and that of `steady_metric` in one,
    (features, features); None where there is neither."""
    if metric is not None:
        metric = np.kron(np.eye(states.shape[1] // len(metric)), metric)
    steady = steady_metric(in_metric(states, metric), prompts)
    return metric if steady is None else steady if metric is None else steady @ metric


def probe_of_lane(
    fitted: Fitted, lane: str, prompts: Sequence[Prompt], rate: float, at: float | None
) -> tuple[Probe, np.ndarray, np.ndarray]:
    """The probe of a lane with its threshold, its cross-validated scores (prompts,), and what pictures and long text
    were lowered by, (marks,).

    Args: as of `with_threshold`; at: the threshold, where it is given.
    """
    scores, by = fitted.scores[lane], np.zeros(MARKS)
    if at is None:
        by = offsets(scores, prompts, rate)
        scores = lowered(scores, fitted.detected[lane], by)
    limit = threshold_of(scores, prompts, rate) if at is None else at
    (weight, bias), (mark, offset) = fitted.probes[lane], fitted.detectors[lane]
    return Probe((weight - by @ mark).astype(np.float32), float(bias - by @ offset), limit), scores, by


def with_threshold(
    fitted: Fitted,
    prompts: Sequence[Prompt],
    *,
    max_false_positive_rate: float,
    threshold: float | None = None,
    judged: Sequence[int] | None = None,
) -> Calibration:
    """The probe with its threshold, and what it does there. CalibrationError where it is of no use.

    Args:
        max_false_positive_rate: chooses the threshold, unless there is a `threshold`.
        judged: the rows of the prompts that the figures are of, where others took part in choosing the layers.
    """
    rows = list(range(len(prompts)) if judged is None else judged)
    shown, kinds = [prompts[row] for row in rows], kinds_of(prompts)
    found: list[Figure] = []
    lanes = {}
    for name in fitted.probes:
        lanes[name] = probe_of_lane(fitted, name, prompts, max_false_positive_rate, threshold)
        found += figures(name, lanes[name][1][rows], shown, lanes[name][0].threshold)
    read = next(iter(lanes))
    probe, judged_scores, by = lanes[read]
    harmful = [row for row in rows if prompts[row].label == 1]
    _check_usable(found[0], threshold, float(judged_scores[harmful].max()))
    by_kind: Sequence[KindFigure] = ()
    if kinds is not None:
        text = [row for row in rows if prompts[row].channel == "text"]  # words would be read in pictures without error
        scores_of = {name: values[text] for name, values in fitted.scores.items()}
        by_kind = kind_figures([prompts[row] for row in text], kinds[text], scores_of)
    return Calibration(
        probe, tuple(found), tuple(by_kind), tuple(prompts), judged_scores,
        lowered(fitted.final, fitted.detected[read], by),
        max_false_positive_rate if threshold is None else None, fitted.regularization,
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
    if not (overall.auc >= LEAST_AUC and overall.beats_chance):
        where, other = "on these layers", "other --safety-layer and --semantic-layer"
        if overall.feature == "plain":
            where, other = "without projection", "--projection semantic"
        rate = "--max-false-positive-rate" if threshold is None else "--threshold"
        raise CalibrationError(
            f"no usable probe: {where} harmful and harmless prompts are hardly told apart (AUC {overall.auc:.3f}; "
            f"{overall.refused}). Try {other}, another {rate}, or more calibration data. {ENOUGH}."
        )
