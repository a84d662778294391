"""Calibrate: fit the probe on labelled prompts, choose its threshold, and measure its verdicts."""

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

RATES = (0.005, 0.01, 0.02, 0.05, 0.1)  # shares of ordinary prompts refused, for the card's table of thresholds
LEAST_AUC = 0.6  # a probe that ranks hardly better than chance would refuse at random
ENOUGH = "A probe takes hundreds of prompts of either label: --calibration builtin beside yours adds the built-in set"


@dataclass(frozen=True)
class Fitted:
    """Probes before a threshold is chosen: of the "projected" second lane, if any, and of the "plain" main lane.

    The first probe is the one for the model. `scores` holds the cross-validated P(unsafe) of each probe, (prompts,).
    Where kinds were left out, it also holds "words": a bag of words with the C `words`. `final` (prompts,) is P(unsafe)
    by the first probe itself. `detectors` recognise pictures and long text in the same features. `detected` holds
    their outputs, (prompts, marks) each (`channels`).
    """

    probes: dict[str, Linear]
    detectors: dict[str, Detector]
    detected: dict[str, np.ndarray]
    regularization: float
    scores: dict[str, np.ndarray]
    final: np.ndarray
    words: float | None = None


@dataclass(frozen=True)
class Calibration:
    """The probe, its figures, and the scores of every prompt.

    `cross_validated` (prompts,) is P(unsafe) by a probe fitted without the prompt's kind or group (`folds_of`). `final`
    (prompts,) is P(unsafe) by the probe itself. `kinds` are the figures of text by kind, where kinds were left out.
    `max_false_positive_rate` chose the threshold; None for a given threshold. `fitted` is the state before that choice.
    """

    probe: Probe
    figures: tuple[Figure, ...]
    kinds: tuple[KindFigure, ...]
    prompts: tuple[Prompt, ...]
    cross_validated: np.ndarray
    final: np.ndarray
    max_false_positive_rate: float | None
    fitted: Fitted

    def warnings(self) -> list[str]:
        """Return a sentence for each channel, text or picture, in which the probe is not better than chance."""
        return [
            f"{figure.part} prompts: {figure.refused}, which may be chance. Do not rely on the gate there: give more "
            "calibration prompts of that kind."
            for figure in self.figures
            if figure.feature == self.figures[0].feature and figure.part in CHANNELS and not figure.beats_chance
        ]

    def trade_off(self) -> list[tuple[float, Figure]]:
        """Return other thresholds with their figures: one for each share of ordinary prompts refused in `RATES`."""
        thresholds = (threshold_of(self.cross_validated, self.prompts, rate) for rate in RATES)
        name = self.figures[0].feature
        return [(at, figures(name, self.cross_validated, self.prompts, at)[0]) for at in thresholds]


def calibrate(
    model: Any, graph: LayerGraph, features: Features, prompts: Sequence[Prompt], regularization: float | None = None
) -> Fitted:
    """Return probes fitted on the features of the prompts from the lane of `graph` (`rewrite_lane`).

    Args:
        graph: without a projection, the probe reads the main lane.
        regularization: the probe's C; None chooses it by cross-validation, for each lane separately.
    """
    lanes = {"plain": features.projected}  # without a projection, the probe reads the main lane's end
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
    """Return probes fitted on features (prompts, features) by lane, in the head's metric (`head_metric`)."""
    metrics = {name: metric_of(states, prompts, metric) for name, states in features.items()}
    lanes = {name: in_metric(states, metrics[name]) for name, states in features.items()}
    labels, folds = np.array([prompt.label for prompt in prompts]), folds_of(prompts)
    candidates = CANDIDATES if regularization is None else (regularization,)
    chosen = {name: best_regularization(states, labels, folds, candidates) for name, states in lanes.items()}
    scores = {name: held_out for name, (_, held_out) in chosen.items()}
    words = None
    if kinds_of(prompts) is not None:
        words, scores["words"] = best_words(prompts, folds)

    def folded(models: dict[str, Any]) -> dict[str, Any]:
        # The fitted weight v reads R h, but the probe reads h: w . h = v . (R h) = (R^T v) . h.
        return {
            name: (weight if metrics[name] is None else weight @ metrics[name], bias)
            for name, (weight, bias) in models.items()
        }

    probes = {name: fit(states, labels, chosen[name][0]) for name, states in lanes.items()}
    detectors = {name: detector(states, prompts) for name, states in lanes.items()}
    detected = {name: lanes[name] @ weight.T + bias for name, (weight, bias) in detectors.items()}
    first = next(iter(lanes))
    final = probability(lanes[first], *probes[first])
    return Fitted(folded(probes), folded(detectors), detected, chosen[first][0], scores, final, words)


def metric_of(states: np.ndarray, prompts: Sequence[Prompt], metric: np.ndarray | None) -> np.ndarray | None:
    """Return the head's metric and `steady_metric` as one matrix (features, features), or None without both. The head's
    metric applies to each of the concatenated normed states."""
    if metric is not None:
        metric = np.kron(np.eye(states.shape[1] // len(metric)), metric)
    steady = steady_metric(in_metric(states, metric), prompts)
    return metric if steady is None else steady if metric is None else steady @ metric


def probe_of_lane(
    fitted: Fitted, lane: str, prompts: Sequence[Prompt], rate: float, at: float | None
) -> tuple[Probe, np.ndarray, np.ndarray]:
    """Return the lane's probe with its threshold, its cross-validated scores (prompts,), and the offsets (marks,) that
    lower the scores of pictures and long text.

    Args: rate: the largest false-positive rate, which chooses the threshold; at: a given threshold, or None.
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
    """Return the probe with its threshold and figures. Raise CalibrationError where the probe is of no use.

    Args:
        max_false_positive_rate: chooses the threshold, unless `threshold` is given.
        judged: rows of the prompts to compute figures on, where the other prompts took part in choosing the layers.
    """
    rows = list(range(len(prompts)) if judged is None else judged)
    shown, kinds = [prompts[row] for row in rows], kinds_of(prompts)
    lanes = {name: probe_of_lane(fitted, name, prompts, max_false_positive_rate, threshold) for name in fitted.probes}
    of_lanes = [
        figure
        for name, (probe, scores, _) in lanes.items()
        for figure in figures(name, scores[rows], shown, probe.threshold)
    ]
    first = next(iter(lanes))
    probe, scores, by = lanes[first]
    _check_usable(of_lanes[0], threshold, max(scores[row] for row in rows if prompts[row].label == 1))
    of_kinds: Sequence[KindFigure] = ()
    if kinds is not None:
        text = [row for row in rows if prompts[row].channel == "text"]  # words in pictures would be read without error
        scores_of = {name: values[text] for name, values in fitted.scores.items()}
        of_kinds = kind_figures([prompts[row] for row in text], kinds[text], scores_of)
    return Calibration(
        probe, tuple(of_lanes), tuple(of_kinds), tuple(prompts), scores,
        lowered(fitted.final, fitted.detected[first], by),
        max_false_positive_rate if threshold is None else None, fitted,
    )  # fmt: skip


def _check_usable(overall: Figure, threshold: float | None, highest: float) -> None:
    """Raise CalibrationError where the gate would refuse no harmful prompt, or hardly more than chance would.

    Args: threshold: the given threshold, if any; highest: the highest P(unsafe) of the harmful prompts.
    """
    if overall.recall == 0.0 and threshold is not None:
        raise CalibrationError(
            f"no harmful calibration prompt reaches --threshold {threshold:g}, so the gate would refuse nothing. "
            f"The highest has P(unsafe) {highest:.3f}: choose a lower one, or none."
        )
    if not (overall.auc >= LEAST_AUC and overall.beats_chance):
        on_layers = ("on these layers", "other --safety-layer and --semantic-layer")
        where, other = on_layers if overall.feature != "plain" else ("without projection", "--projection semantic")
        rate = "--max-false-positive-rate" if threshold is None else "--threshold"
        raise CalibrationError(
            f"no usable probe: {where} harmful and harmless prompts are hardly told apart (AUC {overall.auc:.3f}; "
            f"{overall.refused}). Try {other}, another {rate}, or more calibration data. {ENOUGH}."
        )
