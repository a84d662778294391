"""The arms that are fitted here: a probe on features of either lane, and words alone.

All are logistic regressions on the calibration prompts, with the strength of regularization chosen by cross-validation
by group, and the threshold that the false-positive rate allows, as in calibration.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sasa_export.errors import CalibrationError
from sasa_export.probe.fit import CANDIDATES, FOLDS, best_regularization, fit, probability, threshold_for
from sasa_export.prompts import asked
from sasa_export.prompts.prompt import Prompt

WORD_STRENGTHS = (0.1, 1.0, 10.0)  # C, of features of length 1

Fitted = tuple[np.ndarray, float | None]  # scores and threshold


def probe(
    calibration: np.ndarray,
    evaluation: np.ndarray,
    prompts: Sequence[Prompt],
    rate: float,
    regularization: float | None,
) -> Fitted:
    """A probe on `calibration` features (calibration prompts, features), applied to `evaluation` (prompts, features).

    Args:
        prompts: the calibration prompts; features are in the head's metric (`head_metric`), as in calibration.
        rate: the largest share of harmless calibration prompts that may be flagged.
        regularization: the probe's C; None chooses it.

    Returns P(unsafe) of the evaluation prompts, (prompts,), and the threshold; None where none keeps the rate.
    """
    labels = np.array([prompt.label for prompt in prompts])
    groups = [prompt.group for prompt in prompts]
    candidates = CANDIDATES if regularization is None else (regularization,)
    chosen, held_out = best_regularization(calibration, labels, groups, candidates)
    weight, bias = fit(calibration, labels, chosen)
    return probability(evaluation, weight, bias), _threshold(held_out, labels, rate)


def words(calibration: Sequence[Prompt], evaluation: Sequence[Prompt], rate: float) -> Fitted:
    """A bag of words (TF-IDF) of what is asked: it sees no model, and the words of a picture where they are known.

    Returns what `probe` does.
    """
    from sklearn.metrics import log_loss
    from sklearn.model_selection import GroupKFold, cross_val_predict

    labels = np.array([prompt.label for prompt in calibration])
    groups = [prompt.group for prompt in calibration]
    texts = [asked(prompt) for prompt in calibration]
    folds = GroupKFold(min(FOLDS, len(set(groups))))
    held_out = {
        strength: cross_val_predict(
            _bag_of_words(strength), texts, labels, groups=groups, cv=folds, method="predict_proba"
        )[:, 1]
        for strength in WORD_STRENGTHS
    }
    chosen = min(WORD_STRENGTHS, key=lambda strength: log_loss(labels, held_out[strength], labels=[0, 1]))
    model = _bag_of_words(chosen).fit(texts, labels)
    scores = model.predict_proba([asked(prompt) for prompt in evaluation])[:, 1]  # (prompts,)
    return scores, _threshold(held_out[chosen], labels, rate)


def _bag_of_words(strength: float) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    vectors = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b")  # single letters too: "i" is a word
    return make_pipeline(vectors, LogisticRegression(C=strength, class_weight="balanced", max_iter=1000))


def _threshold(held_out: np.ndarray, labels: np.ndarray, rate: float) -> float | None:
    try:
        return threshold_for(held_out, labels, rate)
    except CalibrationError:  # it is certain of too many harmless prompts
        return None
