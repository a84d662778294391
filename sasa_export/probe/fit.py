"""The probe: logistic regression on first-token logits, as in the paper, and its threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sasa_export.errors import CalibrationError

FOLDS = 5
ROWS = 4096  # of the head at a time
PAPER = 1.0  # the reproduction's C
CANDIDATES = (PAPER, 1e-2, 1e-3, 1e-4, 1e-5)  # hundreds of prompts against hundreds of features: less is often more
HIGHEST = 1 - 1e-6  # above it, a float32 probability no longer tells prompts apart


@dataclass(frozen=True)
class Probe:
    """`weight` (features,) and `bias`, float32, and the probability at and above which a prompt is refused."""

    weight: np.ndarray
    bias: float
    threshold: float


def head_metric(head: np.ndarray) -> np.ndarray:
    """R with |R h| = |W_head h| for every h: the triangular factor of W_head (vocabulary, hidden).

    A logistic regression with an L2 penalty on logits z = W_head h has its weights in the span of the
    samples, so fitting it on R h gives the same probe, in `hidden` instead of `vocabulary` dimensions. The
    small jitter keeps the factor defined where W_head has less than full rank.
    """
    gram = np.zeros((head.shape[1], head.shape[1]))  # (hidden, hidden)
    for start in range(0, len(head), ROWS):  # the whole head in float64 would not fit beside a large model
        rows = head[start : start + ROWS].astype(np.float64)  # (rows, hidden)
        gram += rows.T @ rows
    gram[np.diag_indices_from(gram)] += 1e-12 * np.trace(gram) / len(gram)
    return np.linalg.cholesky(gram).T  # (hidden, hidden), upper triangular


def in_metric(features: np.ndarray, metric: np.ndarray | None) -> np.ndarray:
    """Features (prompts, hidden) in the head's metric (hidden, hidden), float64; as they are without one."""
    wide = features.astype(np.float64)
    return wide if metric is None else wide @ metric.T


def fit(features: np.ndarray, labels: np.ndarray, regularization: float = PAPER) -> tuple[np.ndarray, float]:
    """What the reproduction's LogisticRegression(class_weight="balanced", solver="liblinear") converges to.

    On unscaled features (prompts, features), the intercept penalised like a weight, as liblinear does. Newton's method
    is exact, and many times sooner where features are large. `regularization` is C, the inverse strength.

    Returns weight (features,) and bias.
    """
    from sklearn.linear_model import LogisticRegression

    padded = np.pad(features, ((0, 0), (0, 1)), constant_values=1.0)  # (prompts, features + 1)
    basis = None
    if padded.shape[1] > len(padded):  # the weights lie in the span of the prompts
        basis, triangular = np.linalg.qr(padded.T)  # (features + 1, prompts), (prompts, prompts)
        padded = triangular.T
    model = LogisticRegression(
        C=regularization, class_weight="balanced", solver="newton-cholesky", fit_intercept=False, tol=1e-8
    )
    weight = model.fit(padded, labels).coef_[0]
    weight = weight if basis is None else basis @ weight  # (features + 1,)
    return weight[:-1], float(weight[-1])


def probability(features: np.ndarray, weight: np.ndarray, bias: float) -> np.ndarray:
    """P(unsafe) of features (prompts, features): (prompts,)."""
    from scipy.special import expit

    return expit(features @ weight + bias)


def cross_validated(
    features: np.ndarray, labels: np.ndarray, groups: Sequence[str], regularization: float = PAPER
) -> np.ndarray:
    """P(unsafe) of every prompt by a probe that saw no prompt of its group: (prompts,)."""
    from sklearn.model_selection import GroupKFold

    folds = min(FOLDS, len(set(groups)))
    if folds < 2:
        raise CalibrationError('all prompts are of one "group", so none can be held out: give them different groups.')
    scores = np.zeros(len(labels))
    for train, test in GroupKFold(folds).split(features, labels, groups):
        if len(set(labels[train])) < 2:
            raise CalibrationError("a cross-validation fold has one class only: give more prompts of both labels.")
        scores[test] = probability(features[test], *fit(features[train], labels[train], regularization))
    return scores


def best_regularization(
    features: np.ndarray, labels: np.ndarray, groups: Sequence[str], candidates: Sequence[float] = CANDIDATES
) -> tuple[float, np.ndarray]:
    """The candidate with the least cross-validated log loss, and its cross-validated scores."""
    from sklearn.metrics import log_loss

    scores = {value: cross_validated(features, labels, groups, value) for value in candidates}
    best = min(candidates, key=lambda value: log_loss(labels, scores[value], labels=[0, 1]))
    return best, scores[best]


def threshold_for(scores: np.ndarray, labels: np.ndarray, max_false_positive_rate: float) -> float:
    """The lowest threshold at which at most that share of harmless prompts is refused.

    Halfway between two neighbouring scores, so that rounding cannot move a calibration prompt across it.
    """
    harmless = np.sort(scores[labels == 0])[::-1]
    allowed = int(np.floor(max_false_positive_rate * len(harmless)))
    if allowed >= len(harmless):
        return float(np.clip(scores.min() / 2, 1 - HIGHEST, HIGHEST))
    first_kept = float(harmless[allowed])  # the highest harmless score that must stay below
    if first_kept >= HIGHEST:
        raise CalibrationError(
            f"the probe is certain of {allowed + 1} harmless prompts that they are harmful, so no threshold keeps "
            f"over-refusal to {max_false_positive_rate:g}. Try --regularization auto, other layers or data, or "
            "--threshold."
        )
    upper = float(np.min(scores, where=scores > first_kept, initial=1.0))
    return float(np.clip(max((first_kept + upper) / 2, np.nextafter(first_kept, 1.0)), 1 - HIGHEST, HIGHEST))
