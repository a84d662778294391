"""Figures and their intervals, against scikit-learn, against resampling, and against what a pencil gives."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from sasa_export.probe.intervals import (
    DRAWS,
    Estimate,
    auc,
    auc_of,
    bootstrap,
    is_below,
    mean_of,
    recall_at,
    resamples,
    share,
    within_noise,
)


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
    assert not is_below(mean_of(np.ones(4), groups[:4]), mean_of(np.ones(4) + 1e-12, groups[:4]))
    unrelated = auc_of(labels * 1.4 + draw.normal(size=200), labels, groups)
    assert not is_below(unrelated, second, among=30)
    assert within_noise({"worse": first, "unrelated": unrelated, "best": second}) == ["unrelated", "best"]
    for scores, value in ((labels.astype(float), 1.0), (np.zeros(200), 0.5)):
        certain = auc_of(scores, labels, groups)
        assert (certain.value, certain.low, certain.high) == (value, value, value)


def test_a_draw_is_the_figure_of_the_prompts_it_draws() -> None:
    draw, labels = np.random.default_rng(3), np.arange(60) % 2
    scores = np.round(np.clip(draw.normal(0.4 + 0.2 * labels, 0.2), 0, 1), 1)  # with ties
    weights = draw.integers(0, 4, size=(5, 60))
    found = zip(weights, auc(scores, labels, weights), recall_at(0.2, scores, labels, weights), strict=True)
    for row, area, recall in found:
        repeated = np.repeat(np.arange(60), row)
        assert area == pytest.approx(roc_auc_score(labels[repeated], scores[repeated]))
        wrong, caught, _ = roc_curve(labels[repeated], scores[repeated], drop_intermediate=False)
        assert recall == pytest.approx(caught[wrong <= 0.2].max())


def test_whole_groups_are_drawn_the_same_each_time() -> None:
    groups = np.array(["a", "b", "a", "c", "c", "c"])
    found = np.concatenate(list(resamples(groups)))
    assert found.shape == (DRAWS, 6) and (found[:, [0, 1, 3]].sum(1) == 3).all()
    assert (found[:, 0] == found[:, 2]).all() and (found[:, 3] == found[:, 5]).all()
    whole = np.array([1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    expected = Estimate(2.0, *np.quantile(2 * found[:, 0], [0.025, 0.975]))
    assert bootstrap(lambda weights: weights @ whole, groups) == expected
