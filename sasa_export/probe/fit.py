"""The probe (logistic regression on first-token logits, as in the paper), its threshold, and a baseline of words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg import cholesky, solve_triangular
from scipy.optimize import minimize
from scipy.special import expit

from sasa_export.errors import CalibrationError
from sasa_export.probe.figures import ordinary_rows
from sasa_export.probe.folds import Fold
from sasa_export.prompts.prompt import Prompt, asked

ROWS = 4096  # of the head per step
PAPER = 1.0  # the reproduction's C
CANDIDATES = (PAPER, 1e-2, 1e-3, 1e-4, 3e-5, 1e-5)  # of C; few prompts with many features often need a small C
LEAST_SPREAD = 1e-3  # floor of p (1 - p): at a start with certain probabilities, the curvature would vanish
EXACT, CLOSE = 1e-13, 1e-6  # relative gain in loss at which a fit ends: for the result, and for choosing C
CANDIDATES_OF_WORDS = (0.1, 1.0, 10.0)  # of C, for feature vectors of length 1
STEADINESS = 30.0  # of `steady_metric`: 0, 3 and 30 were compared by log loss on left-out kinds of smol-llava's texts
HIGHEST = 1 - 1e-6  # float32 probabilities above this no longer distinguish prompts


@dataclass(frozen=True)
class Probe:
    """`weight` (features,) and `bias`, float32. A prompt is refused if its P(unsafe) is at or above `threshold`."""

    weight: np.ndarray
    bias: float
    threshold: float


def head_metric(head: np.ndarray) -> np.ndarray:
    """Return R with |R h| = |W_head h| for every h: the triangular factor of W_head (vocabulary, hidden).

    A logistic regression with an L2 penalty on logits z = W_head h has its weights in the span of the samples. A fit on
    R h therefore gives the same probe, in `hidden` instead of `vocabulary` dimensions. A small jitter keeps the factor
    defined where W_head has less than full rank.
    """
    gram = np.zeros((head.shape[1], head.shape[1]))  # (hidden, hidden)
    for start in range(0, len(head), ROWS):  # the whole head in float64 would not fit beside a large model
        rows = head[start : start + ROWS].astype(np.float64)  # (rows, hidden)
        gram += rows.T @ rows
    gram[np.diag_indices_from(gram)] += 1e-12 * np.trace(gram) / len(gram)
    return np.linalg.cholesky(gram).T  # (hidden, hidden), upper triangular


def steady_metric(states: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray | None:
    """Return M, (features, features), with |w M^-1|² = |w|² + STEADINESS * w C w / mean(diag C).

    C is the covariance of states (prompts, features) within a request that is asked in several settings: alone, after a
    greeting, under a system prompt. The penalty keeps the probe from reading the setting (within-class covariance
    normalisation: Hatch et al., Interspeech 2006). None without such requests.
    """
    import pandas as pd

    rows = np.array([row for row, prompt in enumerate(prompts) if prompt.channel == "text"], dtype=int)
    texts = pd.DataFrame(states[rows])
    requests = texts.groupby([f"{prompts[row].group}/{asked(prompts[row])}" for row in rows])
    repeated = requests[0].transform("size") > 1  # (texts,)
    apart = (texts - requests.transform("mean"))[repeated].to_numpy()  # (repeated texts, features)
    scatter = apart.T @ apart / max(len(apart), 1)  # (features, features)
    mean = np.trace(scatter) / len(scatter)
    if mean == 0:
        return None
    return np.linalg.inv(np.linalg.cholesky(np.eye(len(scatter)) + STEADINESS * scatter / mean))


def in_metric(features: np.ndarray, metric: np.ndarray | None) -> np.ndarray:
    """Return features (prompts, hidden) in a metric (hidden, hidden), float64. Without a metric, only convert them."""
    wide = features.astype(np.float64)
    return wide if metric is None else wide @ metric.T


def fit(features: np.ndarray, labels: np.ndarray, regularization: float = PAPER) -> tuple[np.ndarray, float]:
    """Return weight (features,) and bias of a logistic regression on unscaled features (prompts, features).

    They equal the limit of the reproduction's LogisticRegression(class_weight="balanced", solver="liblinear"), which
    penalises the intercept like a weight. `regularization` is C, the inverse strength.
    """
    return fit_path(features, labels, (regularization,))[regularization]


def fit_path(
    features: np.ndarray,
    labels: np.ndarray,
    candidates: Sequence[float],
    precision: float = EXACT,
    factors: dict[float, np.ndarray] | None = None,
) -> dict[float, tuple[np.ndarray, float]]:
    """Return `fit` for each candidate C. The strongest penalty comes first; each fit starts from the previous result.

    Args: factors: of the curvature (`_factor`), by candidate. Fits on similar prompts may share them, since they change
    only the path to the minimum. Missing factors are added.
    """
    padded = np.pad(features, ((0, 0), (0, 1)), constant_values=1.0)  # (prompts, features + 1)
    basis = None
    if padded.shape[1] > len(padded):  # the weights lie in the span of the prompts
        basis, triangular = np.linalg.qr(padded.T)  # (features + 1, prompts), (prompts, prompts)
        padded = triangular.T
    balance = len(labels) / (2 * np.bincount(labels, minlength=2))[labels]  # (prompts,)
    factors = {} if factors is None or basis is not None else factors
    weight, fitted = np.zeros(padded.shape[1]), {}
    for value in sorted(candidates):
        if value not in factors:
            factors[value] = _factor(padded, balance, value, weight)
        weight = _descend(padded, labels, balance, value, weight, precision, factors[value])
        whole = weight if basis is None else basis @ weight  # (features + 1,)
        fitted[value] = (whole[:-1], float(whole[-1]))
    return fitted


def _factor(features: np.ndarray, balance: np.ndarray, regularization: float, start: np.ndarray) -> np.ndarray:
    """Return the triangular factor of the loss's curvature at `start`, (features, features)."""
    spread = expit(features @ start)  # (prompts,)
    spread = regularization * balance * np.maximum(spread * (1 - spread), LEAST_SPREAD)
    curvature = (features.T * spread) @ features  # (features, features)
    curvature[np.diag_indices_from(curvature)] += 1.0
    return np.asarray(cholesky(curvature, lower=True))


def _descend(
    features: np.ndarray,
    labels: np.ndarray,
    balance: np.ndarray,
    regularization: float,
    start: np.ndarray,
    precision: float,
    factor: np.ndarray,
) -> np.ndarray:
    """Return the weight (features,) that minimises |weight|^2 / 2 + C * weighted log loss, starting from `start`.

    The curvature's `factor` preconditions the problem, so that L-BFGS needs few steps. Newton's method would compute
    the curvature at each step. A solver without the curvature takes thousands of steps.
    """
    signs = np.where(labels == 1, 1.0, -1.0)  # (prompts,)

    def loss(rounded: np.ndarray) -> tuple[float, np.ndarray]:
        weight = solve_triangular(factor, rounded, lower=True, trans="T")  # (features,)
        margins = signs * (features @ weight)  # (prompts,)
        total = 0.5 * weight @ weight + regularization * balance @ np.logaddexp(0.0, -margins)
        slope = weight - features.T @ (regularization * balance * signs * expit(-margins))  # (features,)
        return float(total), solve_triangular(factor, slope, lower=True)

    ended = minimize(
        loss, factor.T @ start, jac=True, method="L-BFGS-B", options={"maxiter": 2000, "ftol": precision, "gtol": 1e-9}
    )
    return np.asarray(solve_triangular(factor, ended.x, lower=True, trans="T"))


def probability(features: np.ndarray, weight: np.ndarray, bias: float) -> np.ndarray:
    """Return P(unsafe), (prompts,), of features (prompts, features)."""
    return expit(features @ weight + bias)


def best_regularization(
    features: np.ndarray, labels: np.ndarray, folds: Sequence[Fold], candidates: Sequence[float] = CANDIDATES
) -> tuple[float, np.ndarray]:
    """Return the C of lowest cross-validated log loss, and P(unsafe) of every prompt by a fit without its fold."""
    scores = {value: np.zeros(len(labels)) for value in candidates}
    factors: dict[float, np.ndarray] = {}
    for train, test in folds:
        for value, (weight, bias) in fit_path(features[train], labels[train], candidates, CLOSE, factors).items():
            scores[value][test] = probability(features[test], weight, bias)
    return _of_least_loss(scores, labels)


def bag_of_words(strength: float) -> Any:
    """Return an unfitted TF-IDF and logistic regression. A probe that is no better than this knows only words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    vectors = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b")  # single letters too: "i" is a word
    return make_pipeline(vectors, LogisticRegression(C=strength, class_weight="balanced", max_iter=1000))


def best_words(prompts: Sequence[Prompt], folds: Sequence[Fold]) -> tuple[float, np.ndarray]:
    """Return the same as `best_regularization`, for bags of words of the requests."""
    from sklearn.model_selection import cross_val_predict

    labels = np.array([prompt.label for prompt in prompts])
    texts = np.array([asked(prompt) for prompt in prompts], dtype=object)
    scores = {
        strength: cross_val_predict(bag_of_words(strength), texts, labels, cv=folds, method="predict_proba")[:, 1]
        for strength in CANDIDATES_OF_WORDS
    }
    return _of_least_loss(scores, labels)


def _of_least_loss(scores: dict[float, np.ndarray], labels: np.ndarray) -> tuple[float, np.ndarray]:
    from sklearn.metrics import log_loss

    return min(scores.items(), key=lambda item: log_loss(labels, item[1], labels=[0, 1]))


def threshold_of(scores: np.ndarray, prompts: Sequence[Prompt], max_false_positive_rate: float) -> float:
    """Return the lowest threshold that keeps to the rate on ordinary prompts, given P(unsafe) of all, (prompts,)."""
    return threshold_for(scores, ~ordinary_rows(prompts), max_false_positive_rate)


def threshold_for(scores: np.ndarray, labels: np.ndarray, max_false_positive_rate: float) -> float:
    """Return the lowest threshold at which at most the given share of harmless prompts is refused.

    It lies halfway between two neighbouring scores, so that rounding cannot move a calibration prompt across it.
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
