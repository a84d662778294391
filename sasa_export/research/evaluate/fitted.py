"""What is fitted here: a probe on features of either lane, and words alone.

Both are logistic regressions on the calibration prompts, with the strength of regularization chosen by
cross-validation, and the threshold that the false-positive rate allows, as in calibration.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import sasa_export.probe as probes
from sasa_export.errors import CalibrationError
from sasa_export.probe.fit import probability, threshold_of
from sasa_export.probe.folds import folds_of
from sasa_export.probe.words import bag_of_words, best_words
from sasa_export.prompts import asked
from sasa_export.prompts.prompt import Prompt
from sasa_export.prompts.shares import labels_and_groups

Judged = tuple[np.ndarray, float | None]  # P(unsafe) of the evaluation prompts, and a threshold if one keeps the rate


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
    try:
        return scores, threshold_of(held_out, calibration, rate)
    except CalibrationError:  # as above
        return scores, None
