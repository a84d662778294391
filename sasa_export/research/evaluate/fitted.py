"""What is fitted here: a probe on features of either lane, or behind an earlier block of the second, and words alone.

All are logistic regressions on the calibration prompts, with the strength of regularization chosen by cross-validation,
and the threshold that the false-positive rate allows, as in calibration.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

import sasa_export.probe as probes
from sasa_export.errors import CalibrationError
from sasa_export.graph import LayerGraph
from sasa_export.probe.fit import CANDIDATES, best_regularization, fit, in_metric, probability, threshold_of
from sasa_export.probe.folds import folds_of
from sasa_export.probe.words import bag_of_words, best_words
from sasa_export.prompts import asked
from sasa_export.prompts.prompt import Prompt
from sasa_export.prompts.shares import labels_and_groups
from sasa_export.research.evaluate.arms import ranking
from sasa_export.research.evaluate.subject import Subject

Features = dict[str, np.ndarray]  # (prompts, features): "plain" of the main lane, "projected" of the second, and depths
Judged = tuple[np.ndarray, float | None]  # P(unsafe) of the evaluation prompts, and a threshold if one keeps the rate


def fitted_arms(subject: Subject, features: dict[str, Features], metric: np.ndarray | None) -> dict[str, Judged]:
    """The probes with and without projection, fitted alike or bundled, and words alone; args as of `measure`."""
    prompts, lanes = subject.calibration, {"with": "projected", "without": "plain"}
    found = subject.bundled
    if found is None:
        before = {lane: features["calibration"][lane] for lane in lanes.values()}
        found = probes.fit_probes(before, prompts, metric, subject.regularization)
    after = features["evaluation"]
    arms = {key: probe(found, lane, after[lane], prompts, subject.rate) for key, lane in lanes.items()}
    return {"words": words(prompts, subject.evaluation, subject.rate), **arms}


def probe(found: probes.Fitted, lane: str, evaluation: np.ndarray, prompts: Sequence[Prompt], rate: float) -> Judged:
    """A lane's probe on features (evaluation prompts, features), with the threshold that calibration would choose.

    Args:
        prompts: the calibration prompts.
        rate: the largest share of ordinary calibration prompts that may be flagged.
    """
    try:
        chosen = probes.choose_threshold(found, lane, prompts, rate, None)[0]
        weight, bias, threshold = chosen.weight.astype(float), chosen.bias, chosen.threshold
    except CalibrationError:  # it is certain of too many harmless prompts
        (weight, bias), threshold = found.probes[lane], None
    return probability(evaluation.astype(float), weight, bias), threshold


def words(calibration: Sequence[Prompt], evaluation: Sequence[Prompt], rate: float) -> Judged:
    """A bag of words (TF-IDF) of what is asked: it sees no model, and the words of a picture where they are known."""
    chosen, held_out = best_words(calibration, folds_of(calibration))
    model = bag_of_words(chosen).fit([asked(prompt) for prompt in calibration], labels_and_groups(calibration)[0])
    scores = model.predict_proba([asked(prompt) for prompt in evaluation])[:, 1]  # (prompts,)
    return scores, _threshold(held_out, calibration, rate)


def depths_of(lane: LayerGraph) -> dict[int, str]:
    """The nodes within a lane that can be probed, by block: the projection, and all lane blocks but the last."""
    blocks = lane.of("lane_block")
    if not blocks:  # the projection itself is what the probe reads anyway
        return {}
    inner = {block.attributes["index"]: block.name for block in blocks[:-1]}
    return {blocks[0].attributes["index"] - 1: lane.of("projection")[0].name, **inner}


def depth_curve(subject: Subject, features: dict[str, Features], metric: np.ndarray | None) -> list[dict[str, Any]]:
    """Fit and measure a probe on the normed state behind each `block` of the lane, the first on the projection itself.

    `cost` is the number of blocks that the prompt runs through, in the plain model's. Empty where the lane ends with
    the projection. Args as of `measure`.
    """
    depths, blocks = depths_of(subject.lane), subject.blocks[0]
    if not depths:
        return []
    last = subject.lane.of("lane_block")[-1].attributes["index"]
    labels, folds, found = labels_and_groups(subject.calibration)[0], folds_of(subject.calibration), []
    candidates = CANDIDATES if subject.regularization is None else (subject.regularization,)
    for block, node in {**depths, last: "projected"}.items():
        before, after = (in_metric(features[kind][node], metric) for kind in ("calibration", "evaluation"))
        chosen = best_regularization(before, labels, folds, candidates)[0]
        scores = probability(after, *fit(before, labels, chosen))
        cost = (blocks + block - min(depths)) / blocks
        figures = ranking(scores, *labels_and_groups(subject.evaluation), subject.rate)
        found.append({"block": block, "cost": cost, **figures})
    return found


def _threshold(held_out: np.ndarray, prompts: Sequence[Prompt], rate: float) -> float | None:
    try:
        return threshold_of(held_out, prompts, rate)
    except CalibrationError:  # it is certain of too many harmless prompts
        return None
