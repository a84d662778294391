"""The probe on arrays: its fit, its cross-validation, its threshold and its figures."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from calibration_samples import prompts_of, samples
from hypothesis import given, settings
from hypothesis import strategies as st

from sasa_export.errors import CalibrationError
from sasa_export.probe.calibration import RATES, Calibration, Fitted, fit_probes
from sasa_export.probe.figures import KindFigure, figures, kind_figures, rounded, verdict_on_projection
from sasa_export.probe.fit import (
    Probe,
    best_regularization,
    fit,
    head_metric,
    threshold_for,
    threshold_of,
)
from sasa_export.probe.folds import folds_of, kinds_of
from sasa_export.prompts.prompt import Prompt

# ----------------------------------------------------------------------------------------- fitting a probe


@pytest.mark.parametrize(
    "vocabulary, hidden, count, share, scale",
    [(300, 24, 120, 0.5, 0.2), (90, 40, 60, 0.5, 1.0), (500, 16, 200, 0.15, 0.05), (300, 64, 40, 0.3, 0.2)],
    ids=["usual", "small vocabulary", "unbalanced", "fewer prompts than features"],
)
@pytest.mark.parametrize("strength", [1.0, 1e-3])
def test_the_fit_is_the_papers_on_the_real_logits(
    vocabulary: int, hidden: int, count: int, share: float, scale: float, strength: float
) -> None:
    """Fitting on R h, in `hidden` dimensions, is the reproduction's fit on z = W_head h; intercepts penalised alike."""
    from sklearn.linear_model import LogisticRegression

    draw = np.random.default_rng(vocabulary)
    head = draw.normal(size=(vocabulary, hidden)) * scale + 0.3 * scale * draw.normal(size=hidden)
    states, _ = samples(count, hidden, seed=1)
    labels = (states[:, 0] + draw.normal(size=count) > np.quantile(states[:, 0], 1 - share)).astype(int)
    logits = states @ head.T  # (count, vocabulary)

    metric = head_metric(head)
    weight, bias = fit(states @ metric.T, labels, strength)
    folded = metric.T @ weight  # (hidden,): what the patched model holds
    direct = LogisticRegression(C=strength, class_weight="balanced", solver="liblinear", max_iter=9999, tol=1e-9)
    direct.fit(logits, labels)
    np.testing.assert_allclose(states @ folded + bias, direct.decision_function(logits), rtol=0, atol=1e-4)
    np.testing.assert_allclose(bias, direct.intercept_[0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(folded, head.T @ direct.coef_[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("rank", "loud"), [(1, 0.0), (5, 0.0), (12, 0.0), (12, 5000.0)])
def test_the_metric_keeps_lengths(rank: int, loud: float) -> None:
    """Of heads without full rank too, and of those whose mean row is far longer than the rest, as real ones have it."""
    draw = np.random.default_rng(rank)
    head = draw.normal(size=(50, rank)) @ draw.normal(size=(rank, 12)) + loud * draw.normal(size=12)
    metric = head_metric(head)
    assert metric.shape == (12, 12) and np.allclose(metric, np.triu(metric))
    states = draw.normal(size=(30, 12))
    expected = np.linalg.norm(states @ head.T, axis=1)
    np.testing.assert_allclose(np.linalg.norm(states @ metric.T, axis=1), expected, rtol=1e-4)


# --------------------------------------------------------------------------------------- cross-validation


def test_a_pair_stays_in_one_fold() -> None:
    """Each pair has a feature of its own that gives the label away. A probe that saw the other member knows it."""
    pairs = 20
    features = np.repeat(np.eye(pairs), 2, axis=0) * np.tile([[10.0], [-10.0]], (pairs, 1))
    labels = np.tile([1, 0], pairs)

    def scores(groups: Any) -> np.ndarray:
        return best_regularization(features, labels, folds_of(grouped_prompts(labels, groups)), (1.0,))[1]

    assert np.ptp(scores([n // 2 for n in range(2 * pairs)])) < 1e-6
    alone = np.random.default_rng(0).permutation(2 * pairs)
    assert np.mean((scores(alone) > 0.5) == labels) > 0.6


@pytest.mark.parametrize("groups", [["all"] * 20, ["harmless", "harmful"] * 10], ids=["one group", "a group a class"])
def test_groups_that_leave_nothing_to_validate(groups: list[str]) -> None:
    with pytest.raises(CalibrationError):
        folds_of(grouped_prompts(samples(20, 3)[1], groups))


def grouped_prompts(labels: Any, groups: Any, kinds: Any = None) -> list[Prompt]:
    kinds = [""] * len(labels) if kinds is None else kinds
    rows = zip(labels, groups, kinds, strict=True)
    return [Prompt(str(n), "", int(label), str(group), kind=kind) for n, (label, group, kind) in enumerate(rows)]


def test_each_kind_is_left_out_once_and_nothing_that_shares_its_groups_is_fitted_on() -> None:
    labels, kinds = [0, 1] * 10, [kind for kind in "abcde" for _ in range(4)]
    groups = [*range(18), 0, 1]  # the last kind has groups of the first one
    folds = folds_of(grouped_prompts(labels, groups, kinds))
    assert [sorted({kinds[row] for row in test}) for _, test in folds] == [[kind] for kind in "abcde"]
    assert all(not set(train) & set(test) for train, test in folds)
    assert set(folds[0][0]) == set(range(4, 18)) and set(folds[4][0]) == set(range(2, 16))


@pytest.mark.parametrize("kinds", [["a", "b", "c", "a"] * 5, ["a", "x", "b", "x", "c", "x", "d", "x", "e", "x"] * 2])
def test_too_few_kinds_leave_out_groups(kinds: list[str]) -> None:
    """Three kinds are too few to leave one out, and so is one kind that has all prompts of a label."""
    prompts = grouped_prompts([0, 1] * 10, range(20), kinds)
    assert kinds_of(prompts) is None and len(folds_of(prompts)) == 5


def test_the_best_regularization_is_the_one_of_least_loss() -> None:
    """More features than prompts, and little to see: the strongest regularization wins, whatever the order."""
    features, labels = samples(80, 200, gap=1.5)
    folds = folds_of(grouped_prompts(labels, [n // 2 for n in range(80)]))
    for candidates in ((1.0, 1e-2), (1e-2, 1.0)):
        value, scores = best_regularization(features, labels, folds, candidates)
        assert value == 1e-2
        np.testing.assert_array_equal(scores, best_regularization(features, labels, folds, (value,))[1])


# ----------------------------------------------------------------------------------------------- threshold

# Eighths and the like, so that a share of the prompts is exact in binary.
shares = st.integers(0, 63).map(lambda part: part / 64)
scores_and_labels = st.lists(
    st.tuples(st.one_of(st.floats(1e-5, 1.0), st.sampled_from([0.0, 0.25, 0.5, 1.0])), st.integers(0, 1)),
    min_size=1,
    max_size=40,
).map(lambda rows: (np.array([row[0] for row in rows]), np.array([row[1] for row in rows])))


@settings(max_examples=200, deadline=None)
@given(scores_and_labels, shares)
def test_the_threshold_refuses_few_harmless_prompts_and_no_fewer_than_it_may(
    drawn: tuple[np.ndarray, np.ndarray], share: float
) -> None:
    scores, labels = drawn
    harmless = scores[labels == 0]
    try:
        threshold = threshold_for(scores, labels, share)
    except CalibrationError:
        # Then more harmless prompts than allowed are as good as certain to be called harmful.
        assert (harmless >= 1 - 1e-6).sum() > share * len(harmless)
        return
    assert 0.0 < threshold < 1.0 and isinstance(threshold, float)
    assert (harmless >= threshold).sum() <= share * len(harmless)
    below = harmless[harmless < threshold]
    assert not len(below) or (harmless >= below.max()).sum() > share * len(harmless)


@settings(max_examples=100, deadline=None)
@given(scores_and_labels, shares)
def test_the_threshold_lies_between_scores(drawn: tuple[np.ndarray, np.ndarray], share: float) -> None:
    """As far from its neighbours as can be: rounding to float32 moves no calibration prompt across it."""
    scores = np.round(drawn[0], 3) * 0.9 + 0.05
    threshold = threshold_for(scores, drawn[1], share)
    assert np.abs(scores - threshold).min() > 1e-5
    assert ((scores >= threshold) == (scores.astype(np.float32) >= np.float32(threshold))).all()


def test_thresholds_by_hand() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1])
    scores = np.array([0.1, 0.2, 0.3, 0.6, 0.5, 0.8])
    for rate, expected in ((0.0, 0.7), (0.25, 0.4), (0.24, 0.7), (0.5, 0.25)):
        assert threshold_for(scores, labels, rate) == pytest.approx(expected)
    assert threshold_for(np.array([0.2, 0.4]), np.array([0, 0]), 0.0) == pytest.approx(0.7)


# ------------------------------------------------------------------------------------------------- figures


def test_figures_by_hand() -> None:
    #        text: 0.9 harmful, 0.2 harmless, 0.6 harmless, 0.55 harmful;  picture: 0.3 harmful, 0.1 harmless
    labels, scores = [1, 0, 0, 1, 1, 0], np.array([0.9, 0.2, 0.6, 0.55, 0.3, 0.1])
    found = {figure.part: figure for figure in figures("plain", scores, prompts_of(labels, "ttttpp"), 0.55)}
    assert list(found) == ["all", "text", "picture"]
    both, text, picture = found.values()
    assert (text.prompts, picture.prompts, both.prompts) == (4, 2, 6)
    assert (text.auc, picture.auc, both.auc) == pytest.approx((0.75, 1.0, 7 / 9))
    assert (text.recall, picture.recall, both.recall) == pytest.approx((1.0, 0.0, 2 / 3))  # 0.55 is at the threshold
    assert (text.false_positive_rate, picture.false_positive_rate) == (0.5, 0.0)
    assert both.false_positive_rate == pytest.approx(1 / 3)
    assert json.loads(json.dumps(rounded(both)))["auc"] == 0.7778


def test_a_channel_with_one_label_has_no_figure() -> None:
    found = figures("plain", np.array([0.9, 0.1, 0.7]), prompts_of([1, 0, 1], "ttp"), 0.5)
    assert [figure.part for figure in found] == ["all", "text"]


def test_borderline_prompts_have_a_rate_of_their_own() -> None:
    """AUC and false positives are of ordinary prompts, and so is the threshold."""
    scores = np.array([0.9, 0.8, 0.1, 0.2, 0.3, 0.4, 0.85, 0.7])
    prompts = grouped_prompts([1, 1, 0, 0, 0, 0, 0, 0], range(8))
    prompts = [replace(prompt, borderline=row > 5) for row, prompt in enumerate(prompts)]
    (found,) = figures("plain", scores, prompts, 0.75)
    assert (found.auc, found.recall, found.false_positive_rate, found.borderline_rate) == (1.0, 1.0, 0.0, 0.5)
    assert threshold_of(scores, prompts, 0.0) == pytest.approx(0.55)
    alone = [prompt for prompt in prompts if prompt.label or prompt.borderline]
    assert figures("plain", scores[[0, 1, 6, 7]], alone, 0.75)[0].false_positive_rate == 0.5, "nothing else to go by"


def test_figures_by_kind_by_hand() -> None:
    """A kind of one label is told from all of the other."""
    prompts = grouped_prompts([1, 0, 1, 0], range(4))
    scores = {"plain": np.array([0.9, 0.2, 0.3, 0.4]), "words": np.array([0.5, 0.1, 0.2, 0.1])}
    found = kind_figures(prompts, np.array(["a", "a", "b", "c"]), scores)
    assert found == [KindFigure("a", 2, None, 1.0, 1.0), KindFigure("b", 1, None, 0.5, 1.0),
                     KindFigure("c", 1, None, 0.5, 1.0)]  # fmt: skip


def test_the_trade_off_refuses_as_many_ordinary_prompts_as_it_says() -> None:
    scores, labels = np.linspace(0.001, 0.999, 1000), np.arange(1000) % 2
    prompts = grouped_prompts(labels, range(1000))
    probe = Probe(np.zeros(1, np.float32), 0.0, 0.5)
    fitted = Fitted({}, {}, {}, 1.0, {}, scores)
    made = Calibration(
        probe, tuple(figures("plain", scores, prompts, 0.5)), (), tuple(prompts), scores, scores, 0.02, fitted
    )
    offered = made.trade_off()
    thresholds = [threshold for threshold, _ in offered]
    assert thresholds == sorted(thresholds, reverse=True)
    for rate, (threshold, figure) in zip(RATES, offered, strict=True):
        assert figure.false_positive_rate <= rate < figure.false_positive_rate + 0.003
        assert figure.recall == pytest.approx((scores[labels == 1] >= threshold).mean())


@pytest.mark.parametrize(
    "projected, plain, said",
    [(0.9, 0.5, "helps on"), (0.5, 0.9, "does not help on this model: try --projection none"), (0.6, 0.61, "neither")],
)
def test_projection_is_judged_by_what_is_refused(projected: float, plain: float, said: str) -> None:
    labels = np.arange(400) % 2
    prompts = grouped_prompts(labels, range(400))
    found = []
    for name, share in {"projected": projected, "plain": plain}.items():
        refused = (labels == 1) & (np.arange(400) < 400 * share)
        found += figures(name, np.where(refused, 0.8, 0.2), prompts, 0.5)
    assert said in verdict_on_projection(found)


def test_a_probe_pays_for_reading_the_setting() -> None:
    """Where a setting moves all prompts along one direction, the probe turns away from it."""
    rng, moved = np.random.default_rng(0), np.arange(8) == 1
    requests, labels = rng.normal(size=(100, 8)), np.arange(100) % 2
    requests[:, 0] += labels  # what tells them apart, and beside it, by chance, the direction of the setting
    requests[:, 1] += 1.5 * labels
    states = np.concatenate([requests, requests + 6 * rng.normal(size=(100, 1)) * moved])
    prompts = [
        Prompt(f"{row}/{place}", f"request {row}", int(labels[row]), str(row), setting=place)
        for place in ("alone", "greeting") for row in range(100)
    ]  # fmt: skip
    once = [replace(prompt, prompt=f"{prompt.prompt} {prompt.setting}") for prompt in prompts]
    weights = {
        name: fit_probes({"plain": states}, asked, None, 0.1).probes["plain"][0]
        for name, asked in {"steady": prompts, "usual": once}.items()
    }
    share = {name: abs(weight[1]) / np.linalg.norm(weight) for name, weight in weights.items()}
    assert share["steady"] < 0.5 * share["usual"]
