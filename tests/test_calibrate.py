"""Fitting a probe: the mathematics on arrays, the reading of prompts, and the features of tiny models."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, ProcessorMixin

import sasa_export.calibrate as calibration
from sasa_export.calibrate import calibrate, data
from sasa_export.calibrate import probe as probes
from sasa_export.calibrate.data import Prompt, builtin, from_jsonl
from sasa_export.calibrate.features import Features, batches, collect, encode
from sasa_export.calibrate.figure import figures
from sasa_export.calibrate.platt import platt
from sasa_export.calibrate.probe import (
    CANDIDATES,
    best_regularization,
    cross_validated,
    fit,
    head_metric,
    probability,
    quick_fit,
    threshold_for,
)
from sasa_export.errors import CalibrationError
from sasa_export.families import family_of
from sasa_export.graph import LayerGraph, Node
from sasa_export.rewrite import LaneSettings, rewrite_lane
from sasa_export.trace import trace
from sasa_export.verify.cases import choose

Stock = Callable[..., tuple[PreTrainedModel, ProcessorMixin]]


def samples(count: int, hidden: int, *, seed: int = 0, gap: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Random states (count, hidden) whose mean depends on their label (count,) by `gap`."""
    draw = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    direction = draw.normal(size=hidden)
    direction /= np.linalg.norm(direction)
    return draw.normal(size=(count, hidden)) + gap * (labels[:, None] - 0.5) * direction, labels


def prompts_of(labels: Any, channels: str = "text") -> list[Prompt]:
    """Prompts with these labels; `channels` is one name for all, or a letter (t, p) for each."""
    names = {"t": "text", "p": "picture"}
    kinds = [channels] * len(labels) if channels in names.values() else [names[letter] for letter in channels]
    return [
        Prompt(f"prompt {n}", "words", int(label), f"pair {n // 2}", kind, "none")
        for n, (label, kind) in enumerate(zip(labels, kinds, strict=True))
    ]


# ----------------------------------------------------------------------------------------- fitting a probe


@pytest.mark.parametrize(
    "vocabulary, hidden, count, share, scale",
    [(300, 24, 120, 0.5, 0.2), (90, 40, 60, 0.5, 1.0), (500, 16, 200, 0.15, 0.05), (300, 64, 40, 0.3, 0.2)],
    ids=["usual", "small vocabulary", "unbalanced", "fewer prompts than features"],
)
def test_the_fit_is_that_on_the_real_logits(
    vocabulary: int, hidden: int, count: int, share: float, scale: float
) -> None:
    """Fitting on R h, in `hidden` dimensions, is the reproduction's fit on z = W_head h; intercepts penalised alike."""
    from sklearn.linear_model import LogisticRegression

    draw = np.random.default_rng(vocabulary)
    head = draw.normal(size=(vocabulary, hidden)) * scale + 0.3 * scale * draw.normal(size=hidden)
    states, _ = samples(count, hidden, seed=1)
    labels = (states[:, 0] + draw.normal(size=count) > np.quantile(states[:, 0], 1 - share)).astype(int)
    assert 0 < labels.sum() < count
    logits = states @ head.T  # (count, vocabulary)

    metric = head_metric(head)
    weight, bias = fit(states @ metric.T, labels)
    folded = metric.T @ weight  # (hidden,): what the patched model holds
    direct = LogisticRegression(C=1.0, class_weight="balanced", solver="liblinear", max_iter=1000).fit(logits, labels)
    decision = states @ folded + bias
    np.testing.assert_allclose(decision, states @ metric.T @ weight + bias, rtol=0, atol=1e-9)
    np.testing.assert_allclose(decision, direct.decision_function(logits), rtol=0, atol=1e-4)
    np.testing.assert_allclose(bias, direct.intercept_[0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(folded, head.T @ direct.coef_[0], rtol=0, atol=1e-4)


def test_the_metric_keeps_lengths() -> None:
    draw = np.random.default_rng(0)
    head = draw.normal(size=(50, 12)).astype(np.float32)
    metric = head_metric(head)
    assert metric.shape == (12, 12) and np.allclose(metric, np.triu(metric))
    states = draw.normal(size=(30, 12))
    expected = np.linalg.norm(states @ head.astype(np.float64).T, axis=1)
    np.testing.assert_allclose(np.linalg.norm(states @ metric.T, axis=1), expected, rtol=1e-9)


@pytest.mark.parametrize("rank", [1, 5, 11])
def test_the_metric_of_a_head_without_full_rank(rank: int) -> None:
    draw = np.random.default_rng(rank)
    head = draw.normal(size=(50, rank)) @ draw.normal(size=(rank, 12))
    states = draw.normal(size=(30, 12))
    expected = np.linalg.norm(states @ head.T, axis=1)
    np.testing.assert_allclose(np.linalg.norm(states @ head_metric(head).T, axis=1), expected, rtol=1e-4)


def test_the_metric_of_a_head_with_one_loud_direction() -> None:
    """Real heads have a mean row far longer than the rest."""
    draw = np.random.default_rng(3)
    head = draw.normal(size=(400, 48)) * 0.01 + 50.0 * draw.normal(size=48)
    assert np.isfinite(head_metric(head.astype(np.float32))).all()


def test_classes_are_balanced() -> None:
    """Ten times as many prompts of one class do not move the verdict on the middle between two equal clouds."""
    draw = np.random.default_rng(0)
    harmless, harmful = draw.normal(-2, 1, size=(500, 1)), draw.normal(2, 1, size=(50, 1))
    weight, bias = fit(np.concatenate([harmless, harmful]), np.repeat([0, 1], [500, 50]))
    assert abs(-bias / weight[0]) < 0.3


def test_probability() -> None:
    np.testing.assert_allclose(
        probability(np.array([[1.0, 2.0], [0.0, 0.0], [1e4, 0.0], [-1e4, 0.0]]), np.array([1.0, -1.0]), 0.5),
        [1 / (1 + np.exp(0.5)), 1 / (1 + np.exp(-0.5)), 1.0, 0.0],
    )


# --------------------------------------------------------------------------------------- cross-validation


def test_a_pair_stays_in_one_fold() -> None:
    """Each pair has a feature of its own that gives the label away. A probe that saw the other member knows it."""
    pairs = 20
    features = np.repeat(np.eye(pairs), 2, axis=0) * np.tile([[10.0], [-10.0]], (pairs, 1))
    labels = np.tile([1, 0], pairs)
    together = cross_validated(features, labels, [f"pair {n // 2}" for n in range(2 * pairs)])
    assert np.ptp(together) < 1e-6
    apart = cross_validated(features, labels, [f"prompt {n}" for n in np.random.default_rng(0).permutation(2 * pairs)])
    assert np.mean((apart > 0.5) == labels) > 0.6


def test_every_prompt_is_scored_by_a_probe_that_did_not_see_it() -> None:
    features, labels = samples(46, 4)
    groups = [f"group {n // 2}" for n in range(46)]
    fitted: list[set[str]] = []

    def recorded(train: np.ndarray, *rest: Any) -> Any:
        rows = {int(np.flatnonzero((features == row).all(axis=1))[0]) for row in train}
        fitted.append({groups[row] for row in rows})
        return fit(train, *rest)

    scores = cross_validated(features, labels, groups, fit=recorded)
    left_out = [set(groups) - seen for seen in fitted]
    assert len(fitted) == 5
    assert sorted(group for fold in left_out for group in fold) == sorted(set(groups))
    assert ((scores > 0) & (scores < 1)).all()


def test_cross_validation_is_deterministic_and_sees_separable_classes() -> None:
    features, labels = samples(60, 6, gap=8.0)
    groups = [str(n // 2) for n in range(60)]
    scores = cross_validated(features, labels, groups)
    assert ((scores > 0.5) == labels).all()
    np.testing.assert_array_equal(scores, cross_validated(features, labels, groups))


@pytest.mark.parametrize("groups", [["all"] * 20, ["harmless", "harmful"] * 10], ids=["one group", "a group a class"])
def test_groups_that_leave_nothing_to_validate(groups: list[str]) -> None:
    features, labels = samples(20, 3)
    with pytest.raises(CalibrationError):
        cross_validated(features, labels, groups)


@pytest.mark.parametrize("strength", CANDIDATES)
def test_the_quick_fit_is_the_same_probe(strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Newton's method finds what liblinear finds, and stands back where features are many."""
    features, labels = samples(120, 30, gap=1.0)
    features = 20 * np.exp(np.random.default_rng(3).normal(size=30)) * (features + 1.0)  # off centre: the bias matters
    expected = probability(features, *fit(features, labels, strength))
    weight, bias = quick_fit(features, labels, strength)
    assert weight.shape == (30,)
    assert np.abs(probability(features, weight, bias) - expected).max() < 1e-3
    monkeypatch.setattr(probes, "WIDE", 29)
    np.testing.assert_array_equal(quick_fit(features, labels, strength)[0], fit(features, labels, strength)[0])


def test_the_best_regularization_is_one_of_the_candidates() -> None:
    features, labels = samples(80, 40, gap=1.5)
    groups = [str(n // 2) for n in range(80)]
    value, scores = best_regularization(features, labels, groups, candidates=(1.0, 1e-2))
    assert value in (1.0, 1e-2)
    np.testing.assert_array_equal(scores, cross_validated(features, labels, groups, value))


# ----------------------------------------------------------------------------------------------- threshold

# Eighths and the like, so that a share of the prompts is exact in binary.
shares = st.integers(0, 63).map(lambda part: part / 64)
scores_and_labels = st.lists(
    st.tuples(st.one_of(st.floats(1e-5, 1.0), st.sampled_from([0.0, 0.25, 0.5, 1.0])), st.integers(0, 1)),
    min_size=1,
    max_size=40,
).map(lambda rows: (np.array([row[0] for row in rows]), np.array([row[1] for row in rows])))


@settings(max_examples=400, deadline=None)
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
    refused = (harmless >= threshold).sum()
    assert refused <= share * len(harmless)
    below = harmless[harmless < threshold]
    if len(below):
        assert (harmless >= below.max()).sum() > share * len(harmless)


@settings(max_examples=200, deadline=None)
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
    assert threshold_for(scores, labels, 0.0) == pytest.approx(0.7)
    assert threshold_for(scores, labels, 0.25) == pytest.approx(0.4)
    assert threshold_for(scores, labels, 0.24) == pytest.approx(0.7)
    assert threshold_for(scores, labels, 0.5) == pytest.approx(0.25)
    assert threshold_for(np.array([0.2, 0.4]), np.array([0, 0]), 0.0) == pytest.approx(0.7)


# ------------------------------------------------------------------------------------------------- figures


def test_figures_by_hand() -> None:
    #        text: 0.9 harmful, 0.2 harmless, 0.6 harmless, 0.55 harmful;  picture: 0.3 harmful, 0.1 harmless
    labels, scores = [1, 0, 0, 1, 1, 0], np.array([0.9, 0.2, 0.6, 0.55, 0.3, 0.1])
    found = {figure.channel: figure for figure in figures("plain", scores, prompts_of(labels, "ttttpp"), 0.58)}
    assert list(found) == ["text", "picture", "all"]
    text, picture, both = found.values()
    assert (text.prompts, picture.prompts, both.prompts) == (4, 2, 6)
    assert (text.auc, picture.auc, both.auc) == pytest.approx((0.75, 1.0, 7 / 9))
    assert (text.accuracy, picture.accuracy, both.accuracy) == pytest.approx((0.75, 0.5, 4 / 6))
    assert (text.recall, picture.recall, both.recall) == pytest.approx((0.5, 0.0, 1 / 3))
    assert (text.false_positive_rate, picture.false_positive_rate) == (0.5, 0.0)
    assert both.false_positive_rate == pytest.approx(1 / 3)
    assert json.loads(json.dumps(both.to_json()))["auc"] == 0.7778


def test_a_score_at_the_threshold_is_refused() -> None:
    (figure, _) = figures("plain", np.array([0.5, 0.5]), prompts_of([1, 0]), 0.5)
    assert (figure.recall, figure.false_positive_rate, figure.accuracy, figure.auc) == (1.0, 1.0, 0.5, 0.5)


def test_a_channel_with_one_class_has_no_figure() -> None:
    found = figures("plain", np.array([0.9, 0.1, 0.7]), prompts_of([1, 0, 1], "ttp"), 0.5)
    assert [figure.channel for figure in found] == ["text", "all"]


# -------------------------------------------------------------------------------------------- JSONL files


def line(**fields: Any) -> str:
    return json.dumps({"image": None, "prompt": "the old house", "label": 0, **fields}, ensure_ascii=False)


def ten(*more: str) -> str:
    return "\n".join([*(line(label=number % 2) for number in range(10)), *more])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prompts")


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.sampled_from([0, 1, "a.png"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=6,
)
records = st.dictionaries(
    st.sampled_from(["image", "prompt", "label", "group", "category", "other"]), json_values, max_size=6
)
garbage = st.one_of(
    st.text(),
    records.map(json.dumps),
    records.map(lambda fields: line(**fields)),
    st.sampled_from([line(image="a\0b"), line(image="\ud800"), line(prompt="\ud800"), "NaN", "\ufeff{}"]),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(garbage, max_size=4))
def test_garbage_is_a_calibration_error(folder: Path, lines: list[str]) -> None:
    """Whatever stands in the file, it is read as prompts or refused in one line that names the file."""
    path = folder / "garbage.jsonl"
    path.write_text(ten(*lines), encoding="utf-8", errors="surrogatepass")
    try:
        prompts = from_jsonl(path)
    except CalibrationError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert {prompt.label for prompt in prompts} == {0, 1}
        assert all(type(prompt.label) is int and isinstance(prompt.group, str) for prompt in prompts)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_bytes_are_a_calibration_error(folder: Path, content: bytes) -> None:
    path = folder / "bytes.jsonl"
    path.write_bytes(content)
    with pytest.raises(CalibrationError):
        from_jsonl(path)


def test_what_a_line_says(folder: Path) -> None:
    (folder / "pictures").mkdir()
    tiny.random_image(1).save(folder / "pictures" / "a.png")
    tiny.random_image(2).convert("L").save(folder / "grey.png")
    path = folder / "prompts.jsonl"
    more = [
        line(image="pictures/a.png", prompt="", label=1, group="g", category="c"),
        "",
        line(image=str(folder / "grey.png"), label=0, extra=[1]),
        json.dumps({"prompt": "no image named", "label": 1}),
    ]
    path.write_text(ten(*more) + "\n\n")
    prompts = from_jsonl(path)
    assert len(prompts) == 13
    picture, grey, last = prompts[10:]
    assert (picture.label, picture.group, picture.channel, picture.category) == (1, "g", "picture", "c")
    assert picture.image is not None and picture.image().tobytes() == tiny.random_image(1).tobytes()
    assert picture.conversation()[0]["content"][0]["type"] == "image"
    assert grey.image is not None and grey.image().mode == "RGB"
    assert (grey.name, last.name) == ("line 13", "line 14")
    assert last.conversation() == [{"role": "user", "content": [{"type": "text", "text": "no image named"}]}]
    assert len({prompt.group for prompt in prompts}) == 13


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_a_newline_ends_a_line(folder: Path, separator: str) -> None:
    """JSON strings may hold Unicode's other line separators as they are, some writers leave them so."""
    path = folder / "separators.jsonl"
    text = f"the old{separator}house"
    # Control characters below U+0020 have to be escaped in JSON; U+0085 and above need not.
    written = (
        f'{{"prompt": "{text}", "label": 1}}' if ord(separator) > 0x1F else json.dumps({"prompt": text, "label": 1})
    )
    path.write_text(ten(written), encoding="utf-8", newline="\n")
    assert from_jsonl(path)[-1].prompt == text


def test_windows_line_ends_and_marks(folder: Path) -> None:
    path = folder / "windows.jsonl"
    path.write_bytes(ten().replace("\n", "\r\n").encode())
    assert len(from_jsonl(path)) == 10


# ------------------------------------------------------------------------------------------ the built-in set


def digest(prompts: list[Prompt], rows: range) -> str:
    """SHA-256 over texts and pictures."""
    found = hashlib.sha256()
    for row in rows:
        found.update(prompts[row].prompt.encode())
        image = prompts[row].image
        if image is not None:
            found.update(image().tobytes())
    return found.hexdigest()


SOME = range(0, 400, 7)


def test_the_builtin_set_has_both_channels() -> None:
    prompts = builtin(None)
    pairs = len(Path(data.__file__).with_name("builtin.jsonl").read_text().splitlines())
    assert pairs >= 240 and len(prompts) == 4 * pairs >= 960
    assert len({prompt.name for prompt in prompts}) == len(prompts)
    for channel in ("text", "picture"):
        for label in (0, 1):
            found = [prompt for prompt in prompts if (prompt.channel, prompt.label) == (channel, label)]
            assert len(found) == pairs
            assert len({prompt.group for prompt in found}) == pairs
            assert all((prompt.image is None) == (channel == "text") for prompt in found)
    carriers = {prompt.prompt for prompt in prompts if prompt.channel == "picture"}
    assert carriers == set(data.CARRIERS)
    # The words beside a picture do not tell what is in it.
    for carrier in carriers:
        labels = [prompt.label for prompt in prompts if prompt.prompt == carrier]
        assert 0.4 < np.mean(labels) < 0.6


def test_the_pictures_are_deterministic() -> None:
    """Here, and in another process."""
    expected = digest(builtin(None), SOME)
    assert digest(builtin(None), SOME) == expected
    code = (
        "import hashlib\nfrom sasa_export.calibrate.data import builtin\n"
        f"found, prompts = hashlib.sha256(), builtin(None)\n"
        f"for row in {SOME}:\n"
        "    found.update(prompts[row].prompt.encode())\n"
        "    found.update(prompts[row].image().tobytes() if prompts[row].image else b'')\n"
        "print(found.hexdigest())"
    )
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert fresh.stdout.split()[-1] == expected


@pytest.mark.parametrize("pieces", [lambda word: (len(word) + 1) // 2, len], ids=["pairs of letters", "letters"])
def test_every_request_fits_its_picture(pieces: Callable[[str], int]) -> None:
    """Whatever a tokenizer makes of the words: one that knows no English makes a token of each letter."""
    for prompt in builtin(pieces):
        if prompt.image is not None:
            picture = prompt.image()
            assert picture.mode == "RGB" and min(picture.size) > 0


# -------------------------------------------------------------------------------------- the whole calibration


class Head(torch.nn.Linear):
    """A model that is nothing but its head."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__(hidden, vocabulary, bias=False)
        draw = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(vocabulary, hidden, generator=draw) * 0.3)

    def get_output_embeddings(self) -> Head:
        return self


def calibrated(
    monkeypatch: pytest.MonkeyPatch, projected: np.ndarray, plain: np.ndarray, labels: np.ndarray, **options: Any
) -> Any:
    found = Features(projected.astype(np.float32), plain.astype(np.float32))
    monkeypatch.setattr(calibration, "collect", lambda *args, **kwargs: found)
    graph = LayerGraph((Node("embed", "embed"), Node("sasa.projection", "projection", ("embed",))))
    prompts = prompts_of(labels, "tp" * (len(labels) // 4) + "pt" * (len(labels) // 4))
    return calibrate(
        Head(200, projected.shape[1]),
        None,
        graph,
        prompts,
        **{"batch_size": 4, "max_false_positive_rate": 0.05, **options},
    )


def test_a_calibration_of_separable_states(monkeypatch: pytest.MonkeyPatch) -> None:
    projected, labels = samples(80, 8, gap=6.0)
    plain, _ = samples(80, 8, gap=0.0, seed=5)
    found = calibrated(monkeypatch, projected, plain, labels)
    by_name = {(figure.feature, figure.channel): figure for figure in found.figures}
    assert set(by_name) == {(f, c) for f in ("projected", "plain") for c in ("text", "picture", "all")}
    overall = by_name["projected", "all"]
    assert overall.auc > 0.95 > 0.75 > by_name["plain", "all"].auc
    assert overall.false_positive_rate <= 0.05
    assert found.probe.threshold == threshold_for(found.cross_validated, labels, 0.05)
    assert found.probe.weight.shape == (8,) and found.probe.weight.dtype == np.float32
    # The folded probe on the states says what the fitted one says in its own dimensions.
    states = projected.astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(
        probability(states, found.probe.weight.astype(np.float64), found.probe.bias), found.final, rtol=0, atol=1e-5
    )
    harmful, harmless = found.final[labels == 1], found.final[labels == 0]
    assert harmful.mean() - harmless.mean() > 0.5


def test_shares_keep_every_verdict_and_say_how_many_are_harmful(monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt in five is harmful here, which a probe fitted to balanced classes does not say."""
    states, labels = samples(400, 8, gap=2.0)
    kept = np.flatnonzero((labels == 0) | (np.arange(400) % 8 == 1))  # 200 harmless and 50 harmful
    states, labels = states[kept][:248], labels[kept][:248]
    raw = calibrated(monkeypatch, states, states, labels)
    found = calibrated(monkeypatch, states, states, labels, shares=True)
    for before, after in ((raw.final, found.final), (raw.cross_validated, found.cross_validated)):
        assert ((before >= raw.probe.threshold) == (after >= found.probe.threshold)).all()
        assert (np.argsort(before, kind="stable") == np.argsort(after, kind="stable")).all()
    assert found.cross_validated.mean() == pytest.approx(labels.mean(), abs=1e-3)
    assert raw.cross_validated.mean() > labels.mean() + 0.1
    exact = states.astype(np.float32).astype(np.float64)
    said = probability(exact, found.probe.weight.astype(np.float64), found.probe.bias)
    np.testing.assert_allclose(said, found.final, rtol=0, atol=1e-5)
    assert raw.mapping is None and found.mapping is not None


def test_scores_that_point_the_wrong_way() -> None:
    with pytest.raises(CalibrationError, match="--probabilities raw"):
        platt(np.array([0.9, 0.8, 0.2, 0.1]), np.array([0, 0, 1, 1]))


def test_no_probe_at_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    states, labels = samples(200, 8, gap=0.0)
    with pytest.raises(CalibrationError, match=r"no usable probe.*AUC 0\.[3-5].*--safety-layer") as caught:
        calibrated(monkeypatch, states, states, labels)
    assert "\n" not in str(caught.value)


def test_no_probe_that_catches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One harmless prompt above all harmful ones, and none may be refused: every harmful prompt would pass."""
    draw = np.random.default_rng(0)
    labels = np.arange(120) % 2
    states = np.where(labels, 1.0, -1.0)[:, None] + 0.1 * draw.normal(size=(120, 1))
    states[0] = 50.0
    with pytest.raises(CalibrationError, match=r"no usable probe|certain"):
        calibrated(monkeypatch, states, states, labels, max_false_positive_rate=0.0)


def test_projection_is_judged_by_its_own_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """A main lane that separates does not excuse a second lane that does not: the gate reads the second lane."""
    plain, labels = samples(80, 8, gap=8.0)
    projected, _ = samples(80, 8, gap=0.0, seed=5)
    with pytest.raises(CalibrationError, match="no usable probe"):
        calibrated(monkeypatch, projected, plain, labels)


# ------------------------------------------------------------------------------------- features of a model


def chats(count: int, *, pictures: bool) -> list[Prompt]:
    """Prompts from the tiny models' own conversations."""
    found = []
    for number, chat in enumerate(tiny.conversations(images=pictures, count=count, seed=4)):
        content = chat[0]["content"]
        image = content[0]["image"] if content[0]["type"] == "image" else None
        load = None if image is None else (lambda image=image: image)
        channel = "text" if image is None else "picture"
        found.append(Prompt(f"chat {number}", content[-1]["text"], number % 2, str(number // 2), channel, "none", load))
    return found


def hooks_of_the_decoder(model: Any) -> int:
    """Hooks on its blocks and on its norm; transformers leaves some of its own elsewhere."""
    decoder = model.get_submodule(family_of(model.config.model_type).modules["blocks"].rpartition(".")[0])
    return sum(len(module._forward_hooks) for module in (*decoder.layers, decoder.norm))


@pytest.mark.parametrize(("family", "positions"), [("llava", 1), ("llava", 3), ("qwen2_5_vl", 1), ("gemma3", 2)])
def test_features_are_those_of_the_oracle(stock: Stock, family: str, positions: int) -> None:
    """Both lanes, through the head, are the logits of two full passes with hooks, whatever the batches."""
    model, processor = stock(family)
    prompts = chats(5, pictures=True)
    graph = trace(model, family_of(family), encode(processor, prompts[:1]))
    lane = rewrite_lane(graph, LaneSettings(1, 3, probe_positions=positions))
    head = model.get_output_embeddings().weight.detach()  # (vocabulary, hidden)
    seen: list[int] = []
    for batch_size in (1, 3, 16):
        features = collect(model, processor, lane, prompts, batch_size=batch_size, advance=seen.append)
        assert features.projected.dtype == np.float32 and features.projected.shape == (5, tiny.HIDDEN)
        for row, prompt in enumerate(prompts):
            inputs = encode(processor, [prompt])
            projected = oracle.oracle_logits(model, inputs, 1, 3, None, positions)[0]  # (vocabulary,)
            with torch.no_grad():
                whole = model(**inputs, use_cache=False).logits  # (1, tokens, vocabulary)
            plain = oracle.mean_of_last(whole, inputs, positions)[0]  # (vocabulary,)
            for state, expected in ((features.projected, projected), (features.plain, plain)):
                torch.testing.assert_close(head @ torch.from_numpy(state[row]), expected, rtol=0, atol=2e-4)
    assert sum(seen) == 15
    assert not hooks_of_the_decoder(model)


def test_features_that_are_not_finite_name_the_prompt(stock: Stock) -> None:
    model, processor = stock("llava")
    graph = trace(model, family_of("llava"), encode(processor, chats(1, pictures=False)))
    lane = rewrite_lane(graph, LaneSettings(1, 3))

    def spoil(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * float("inf")

    handle = model.get_submodule("model.language_model.norm").register_forward_hook(spoil)
    try:
        with pytest.raises(CalibrationError, match=r"prompt chat \d is not finite"):
            collect(model, processor, lane, chats(3, pictures=False), batch_size=2)
    finally:
        handle.remove()
    assert not hooks_of_the_decoder(model)


@given(st.text(alphabet="tp", max_size=30), st.integers(1, 8))
def test_batches_hold_every_prompt_once_and_one_channel_each(channels: str, size: int) -> None:
    prompts = prompts_of([0] * len(channels), channels) if channels else []
    found = list(batches(prompts, size))
    assert sorted(row for batch in found for row in batch) == list(range(len(prompts)))
    for batch in found:
        assert 1 <= len(batch) <= size
        assert len({prompts[row].channel for row in batch}) == 1


# --------------------------------------------------------------------------------- choosing what to verify


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.sampled_from("tp"), st.floats(0, 1)), min_size=1, max_size=60),
    st.booleans(),
)
def test_cases_cover_labels_and_channels(rows: list[tuple[int, str, float]], scored: bool) -> None:
    prompts = prompts_of([row[0] for row in rows], "".join(row[1] for row in rows))
    scores = [row[2] for row in rows] if scored else None
    chosen = choose(prompts, scores)
    names = [prompt.name for prompt in chosen]
    assert len(set(names)) == len(names)
    for label in (0, 1):
        for channel in ("text", "picture"):
            kind = [prompt for prompt in prompts if (prompt.label, prompt.channel) == (label, channel)]
            picked = [prompt for prompt in chosen if (prompt.label, prompt.channel) == (label, channel)]
            assert min(1, len(kind)) <= len(picked) <= min(4, len(kind))


def test_cases_reach_from_the_lowest_score_to_the_highest() -> None:
    prompts = prompts_of([1] * 50)
    scores = np.random.default_rng(0).permutation(50) / 50
    picked = [scores[int(prompt.name.split()[1])] for prompt in choose(prompts, scores)]
    assert picked[0] == 0.0 and picked[-1] >= 0.9
    assert picked == sorted(picked)
