"""Figures and their intervals, against scikit-learn, against resampling, and against what a pencil gives."""

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from sasa_export.probe.intervals import auc_of, difference, is_below, mean_of, share, within_noise


def test_a_share_has_wilsons_interval() -> None:
    found = share(np.array([True] * 3 + [False] * 7))
    z, n, p = 1.959964, 10, 0.3
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert found is not None and (found.count, found.total, found.value) == (3, 10, 0.3)
    assert (found.low, found.high) == pytest.approx((middle - half, middle + half), abs=1e-6)
    assert f"{found}" == "30.0% (10.8% to 60.3%)"
    assert share(np.array([], dtype=bool)) is None


def test_the_auc_and_its_interval() -> None:
    """The AUC is scikit-learn's, ties included; the interval is as wide as resampling whole groups makes it."""
    draw = np.random.default_rng(0)
    labels, groups = np.tile([0, 1], 60), np.repeat(np.arange(30), 4)
    scores = np.round(labels + np.repeat(draw.normal(size=30), 4) + draw.normal(size=120), 1)
    estimate = auc_of(scores, labels, groups)
    assert estimate.value == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    drawn = []
    for _ in range(300):
        rows = np.concatenate([np.flatnonzero(groups == group) for group in draw.integers(30, size=30)])
        drawn.append(roc_auc_score(labels[rows], scores[rows]))
    assert (estimate.high - estimate.low) / 2 / 1.96 == pytest.approx(np.std(drawn), rel=0.2)


def test_differences_are_judged_on_the_same_prompts() -> None:
    """Two scores that go up and down together differ clearly, where two as good and unrelated ones would not."""
    draw = np.random.default_rng(0)
    labels, groups = np.tile([0, 1], 100), np.arange(200)
    better = labels * 1.5 + draw.normal(size=200)
    first, second = (auc_of(scores, labels, groups) for scores in (better - labels * 0.25, better))
    assert first.high > second.low, "each interval holds the other's figure"
    assert is_below(first, second) and not is_below(second, first) and not is_below(second, second)
    gain = difference(second, first)
    assert 0 < gain.low < gain.value == second.value - first.value < gain.high < 2 * gain.value
    assert not is_below(mean_of(np.ones(4), groups[:4]), mean_of(np.ones(4) + 1e-12, groups[:4]))
    unrelated = auc_of(labels * 1.4 + draw.normal(size=200), labels, groups)
    assert not is_below(unrelated, second, among=30)
    assert within_noise({"worse": first, "unrelated": unrelated, "best": second}) == ["unrelated", "best"]
    for scores, value in ((labels.astype(float), 1.0), (np.zeros(200), 0.5)):
        certain = auc_of(scores, labels, groups)
        assert (certain.value, certain.low, certain.high) == (value, value, value)
