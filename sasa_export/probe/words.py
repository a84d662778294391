"""A bag of words of what is asked: it sees no model. A probe that is no better has learned words alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sasa_export.probe.folds import Fold
from sasa_export.prompts.prompt import Prompt, asked

STRENGTHS = (0.1, 1.0, 10.0)  # C, of features of length 1


def bag_of_words(strength: float) -> Any:
    """TF-IDF and a logistic regression, unfitted."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    vectors = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b")  # single letters too: "i" is a word
    return make_pipeline(vectors, LogisticRegression(C=strength, class_weight="balanced", max_iter=1000))


def best_words(prompts: Sequence[Prompt], folds: Sequence[Fold]) -> tuple[float, np.ndarray]:
    """The strength with the least cross-validated log loss, and its cross-validated P(unsafe), (prompts,)."""
    from sklearn.metrics import log_loss

    labels = np.array([prompt.label for prompt in prompts])
    texts = np.array([asked(prompt) for prompt in prompts], dtype=object)
    scores = {strength: np.zeros(len(labels)) for strength in STRENGTHS}
    for strength, found in scores.items():
        for train, test in folds:
            found[test] = bag_of_words(strength).fit(texts[train], labels[train]).predict_proba(texts[test])[:, 1]
    best = min(STRENGTHS, key=lambda strength: log_loss(labels, scores[strength], labels=[0, 1]))
    return best, scores[best]
