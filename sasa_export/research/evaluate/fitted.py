"""The arms that are fitted here: a probe on features of either lane, and words alone.

All are logistic regressions on the calibration prompts, with the strength of regularization chosen by cross-validation
by group, and the threshold that the false-positive rate allows, as in calibration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sasa_export.errors import CalibrationError
from sasa_export.probe.fit import (
    CANDIDATES,
    FOLDS,
    best_regularization,
    cross_validated,
    probability,
    quick_fit,
    threshold_for,
)
from sasa_export.prompts import asked
from sasa_export.prompts.prompt import Prompt

WORD_STRENGTHS = (0.1, 1.0, 10.0)  # C, of features of length 1


@dataclass(frozen=True)
class Fitted:
    """P(unsafe) of the evaluation prompts (prompts,), and the threshold of the calibration.

    `threshold` is None where no threshold keeps the false-positive rate. `held_out` holds the cross-validated scores of
    the calibration prompts, `calibration_auc` is theirs.
    """

    scores: np.ndarray
    threshold: float | None
    regularization: float
    calibration_auc: float
    held_out: np.ndarray


def probe(
    calibration: np.ndarray,
    evaluation: np.ndarray,
    prompts: Sequence[Prompt],
    rate: float,
    regularization: float | None,
    parts: int = 1,
) -> Fitted:
    """A probe on `calibration` features (calibration prompts, features), applied to `evaluation`.

    Features are measured in the head's metric (`head_metric`), as in calibration. `prompts` are the calibration
    prompts, `rate` the largest share of harmless ones that may be refused; None as `regularization` chooses it.
    The features are those of `parts` lanes, side by side.
    """
    fit = quick_fit
    labels = np.array([prompt.label for prompt in prompts])
    groups = [prompt.group for prompt in prompts]
    if regularization is None:
        chosen, held_out = best_regularization(calibration, labels, groups, CANDIDATES, fit)
    else:
        chosen = regularization
        held_out = cross_validated(calibration, labels, groups, regularization, fit)
    weight, bias = fit(calibration, labels, chosen)
    return _fitted(probability(evaluation, weight, bias), held_out, labels, rate, chosen)


def words(calibration: Sequence[Prompt], evaluation: Sequence[Prompt], rate: float) -> Fitted:
    """A bag of words (TF-IDF) of what is asked: it sees no model, and the words of a picture where they are known."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    labels = np.array([prompt.label for prompt in calibration])
    groups = [prompt.group for prompt in calibration]
    texts = [asked(prompt) for prompt in calibration]

    def control(strength: float) -> object:
        vectors = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b")  # single letters too: "i" is a word
        return make_pipeline(vectors, LogisticRegression(C=strength, class_weight="balanced", max_iter=1000))

    folds = GroupKFold(min(FOLDS, len(set(groups))))
    held_out = {
        strength: cross_val_predict(control(strength), texts, labels, groups=groups, cv=folds, method="predict_proba")[
            :, 1
        ]
        for strength in WORD_STRENGTHS
    }
    chosen = min(WORD_STRENGTHS, key=lambda strength: log_loss(labels, held_out[strength], labels=[0, 1]))
    model = control(chosen)
    model.fit(texts, labels)  # type: ignore[attr-defined]
    scores = model.predict_proba([asked(prompt) for prompt in evaluation])[:, 1]  # type: ignore[attr-defined]
    return _fitted(scores, held_out[chosen], labels, rate, chosen)


def _fitted(scores: np.ndarray, held_out: np.ndarray, labels: np.ndarray, rate: float, chosen: float) -> Fitted:
    from sklearn.metrics import roc_auc_score

    try:
        threshold = threshold_for(held_out, labels, rate)
    except CalibrationError:  # it is certain of too many harmless prompts
        threshold = None
    return Fitted(scores, threshold, chosen, float(roc_auc_score(labels, held_out)), held_out)
