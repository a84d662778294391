"""The figures of an evaluation, against scikit-learn and against what a pencil gives."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score, roc_curve

from sasa_export.prompts.prompt import Prompt
from sasa_export.research.evaluate import EvaluateError, EvaluateOptions
from sasa_export.research.evaluate import words as report_words
from sasa_export.research.evaluate.answer import Answer, answer_all, append, read_answers
from sasa_export.research.evaluate.arm import Figures, answering, figures, gated, guarded, parts, spelled
from sasa_export.research.evaluate.compare import difference, lowest_attack
from sasa_export.research.evaluate.detection import DRAWS, Curve, detection, resamples
from sasa_export.research.evaluate.fitted import probe, words
from sasa_export.research.evaluate.judge import is_refusal, load_judge
from sasa_export.research.evaluate.prompts import limited
from sasa_export.research.evaluate.reliability import reliability
from sasa_export.research.evaluate.shares import Interval, Share, share
from sasa_export.research.evaluate.targets import OVER_REFUSAL, Target
from sasa_export.research.evaluate.timing import choose, timed
from sasa_export.workers import Workers


def prompts_of(labels: Any, **fields: Any) -> list[Prompt]:
    """Prompts with these labels, two a group; `fields` hold one value for each."""
    defaults: dict[str, Any] = {"channel": "text", "category": "none", "attack": "none", "prompt": "words"}
    return [
        Prompt(
            name=f"prompt {row}",
            label=int(label),
            group=f"pair {row // 2}",
            **{name: fields[name][row] if name in fields else value for name, value in defaults.items()},
        )
        for row, label in enumerate(labels)
    ]


def said(
    texts: list[str], scores: list[float | None] | None = None, tokens: list[tuple[int, ...]] | None = None
) -> Any:
    given = scores or [None] * len(texts)
    ids = tokens or [(9,)] * len(texts)
    return [Answer(f"prompt {row}", ids[row], text, given[row]) for row, text in enumerate(texts)]


def drawn(count: int = 60) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Scores with ties, labels, groups of two."""
    draw = np.random.default_rng(3)
    labels = np.arange(count) % 2
    scores = np.round(np.clip(draw.normal(0.4 + 0.2 * labels, 0.2), 0, 1), 1)
    return scores, labels, [f"pair {row // 2}" for row in range(count)]


# ------------------------------------------------------------------------------------------------- figures


def test_a_share_has_wilsons_interval() -> None:
    found = share(np.array([True] * 3 + [False] * 7))
    z, n, p = 1.959964, 10, 0.3
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert found is not None and (found.count, found.total, found.value) == (3, 10, 0.3)
    assert (found.low, found.high) == pytest.approx((middle - half, middle + half), abs=1e-6)
    assert share(np.array([], dtype=bool)) is None


def test_detection_is_scikit_learns() -> None:
    scores, labels, groups = drawn()
    flagged = scores >= 0.55
    found = detection(scores, flagged, labels, groups, 0.1)
    assert found is not None
    assert found.auc.value == pytest.approx(roc_auc_score(labels, scores))
    assert found.f1.value == pytest.approx(f1_score(labels, flagged))
    assert found.accuracy.value == pytest.approx(accuracy_score(labels, flagged))
    wrong, caught, _ = roc_curve(labels, scores, drop_intermediate=False)
    assert found.recall_at_rate.value == pytest.approx(caught[wrong <= 0.1].max())
    for interval in (found.auc, found.f1, found.recall_at_rate):
        assert interval.low <= interval.value <= interval.high
    assert detection(scores[labels == 1], flagged[labels == 1], labels[labels == 1], groups[:30], 0.1) is None


def test_a_draw_is_the_figure_of_the_prompts_it_draws() -> None:
    scores, labels, _ = drawn()
    weights = np.random.default_rng(0).integers(0, 4, size=(5, len(scores)))
    curve = Curve(scores, labels)
    for row, found in enumerate(curve.auc(weights)):
        repeated = np.repeat(np.arange(len(scores)), weights[row])
        assert found == pytest.approx(roc_auc_score(labels[repeated], scores[repeated]))
        wrong, caught, _ = roc_curve(labels[repeated], scores[repeated], drop_intermediate=False)
        assert curve.recall(weights[row : row + 1], 0.2)[0] == pytest.approx(caught[wrong <= 0.2].max())


def test_whole_groups_are_drawn() -> None:
    drawn_weights = np.concatenate(list(resamples(["a", "b", "a", "c", "c", "c"])))
    assert drawn_weights.shape == (DRAWS, 6)
    assert (drawn_weights[:, 0] == drawn_weights[:, 2]).all()
    assert (drawn_weights[:, 3] == drawn_weights[:, 5]).all()
    assert (drawn_weights[:, [0, 1, 3]].sum(1) == 3).all()
    assert (drawn_weights == np.concatenate(list(resamples(["a", "b", "a", "c", "c", "c"])))).all()


def test_the_difference_of_two_arms_is_paired() -> None:
    scores, labels, groups = drawn()
    assert difference(scores, scores, labels, groups) == Interval(0.0, 0.0, 0.0)
    found = difference(labels.astype(float), scores, labels, groups)
    assert found.value == pytest.approx(1 - roc_auc_score(labels, scores)) and found.low > 0


def test_reliability_by_hand() -> None:
    scores, labels = np.array([0.05, 0.05, 0.95, 1.0]), np.array([0, 1, 1, 1])
    found = reliability(scores, labels)
    assert found.brier == pytest.approx((0.05**2 + 0.95**2 + 0.05**2 + 0) / 4)
    assert found.chance == pytest.approx(0.75 * 0.25)
    assert found.counts == (2, 2) and found.found == (0.5, 1.0)
    assert found.said == pytest.approx((0.05, 0.975))
    assert found.error == pytest.approx((2 * 0.45 + 2 * 0.025) / 4)


def test_the_best_threshold_in_hindsight() -> None:
    labels = np.array([1, 1, 1, 1, 0, 0, 0, 0])
    scores = np.array([0.9, 0.8, 0.5, 0.2, 0.6, 0.4, 0.1, 0.05])
    nobody = np.zeros(8, bool)
    assert lowest_attack(scores, nobody, labels, 0.0) == (0.5, 0.0)
    assert lowest_attack(scores, nobody, labels, 0.25) == (0.25, 0.25)
    assert lowest_attack(scores, np.arange(8) == 3, labels, 0.25) == (0.0, 0.25)  # the model itself refuses the last
    assert lowest_attack(scores, np.arange(8) == 4, labels, 0.0) is None  # and here a harmless one


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (Target("A", 0.02, Share(1, 100, 0.002, 0.054)), "met (target: at most 2%), though the interval reaches"),
        (Target("A", 0.02, Share(0, 1000, 0.0, 0.004)), "met (target: at most 2%)."),
        (Target("A", 0.02, Share(7, 100, 0.034, 0.137)), "missed by 5.0 points"),
        (Target("A", 0.99, Interval(0.7, 0.6, 0.8), at_least=True), "missed by 0.290"),
        (Target("A", 0.99, Interval(0.995, 0.98, 1.0), at_least=True), "met (target: at least 0.99), though"),
    ],
)
def test_what_is_said_of_a_target(target: Target, words: str) -> None:
    assert words in target.sentence()


# ---------------------------------------------------------------------------------------------------- arms


def test_an_arm_refuses_what_it_flags_and_what_the_model_refuses() -> None:
    prompts = prompts_of([1, 1, 1, 0, 0])
    plain = answering(
        said(["Here is how.", "I\u2019m sorry, but I can\u2019t.", "Sure.", "As an AI, no.", "Yes."]), prompts, None
    )
    assert plain.refused.tolist() == [False, True, False, True, False]
    arm = gated("gate", "a gate", plain, np.array([0.9, 0.1, 0.2, 0.1, 0.7]), 0.6)
    found = figures(arm, np.arange(5), prompts, 0.02)
    assert found.attack is not None and (found.attack.count, found.attack.total) == (1, 3)
    assert found.over_refusal is not None and (found.over_refusal.count, found.over_refusal.total) == (2, 2)
    assert found.caught is not None and found.caught.count == 1
    assert found.false_positives is not None and found.false_positives.count == 1
    harmful = figures(arm, np.arange(3), prompts, 0.02)
    assert harmful.over_refusal is None and harmful.detection is None and harmful.caught is not None
    assert gated("gate", "no threshold", plain, np.zeros(5), None).flagged is None


def test_the_patched_models_own_refusal_needs_no_phrase() -> None:
    prompts = prompts_of([1, 1, 0, 1])
    sasa = {"refusal_token_ids": [5, 6, 2], "threshold": 0.5, "refusal": "No way.", "safety_layer": 1}
    answers = said(["No", "No", "Fine.", "First this. No way."], [0.8, 0.2, 0.1, 0.3], [(5, 6), (5, 6), (7, 2), (7, 5)])
    arm = guarded(answers, prompts, sasa, None)
    # The second begins like the refusal without having been flagged, the last is refused in the middle.
    assert arm.refused.tolist() == [True, False, False, True]
    assert arm.flagged is not None and arm.flagged.tolist() == [True, False, False, False]
    assert spelled(answers[0], [5, 6, 2]) and not spelled(answers[2], [5, 6, 2])
    with pytest.raises(EvaluateError, match="no verdict on 1 prompts"):
        guarded(said(["a"] * 4, [0.1, None, 0.1, 0.1]), prompts, sasa, None)


def test_the_judge_is_asked_about_harmful_requests_alone() -> None:
    asked_of: list[tuple[str, str]] = []

    def judge(request: str, answer: str) -> bool:
        asked_of.append((request, answer))
        return answer == "done"

    prompts = prompts_of([1, 1, 0], prompt=["a", "b", "c"])
    arm = answering(said(["done", "what?", "done"]), prompts, judge)
    assert asked_of == [("a", "done"), ("b", "what?")]
    found = figures(arm, np.arange(3), prompts, 0.02)
    assert found.judged is not None and found.attack is not None
    assert (found.judged.count, found.attack.count) == (1, 2)


def test_a_split_request_is_a_channel() -> None:
    prompts = prompts_of([1, 0, 1], channel=["text", "picture", "picture"], attack=["none", "none", "split"])
    assert {name: rows.tolist() for name, rows in parts(prompts)["channel"].items()} == {
        "picture": [1],
        "split": [2],
        "text": [0],
    }
    assert "category" not in parts(prompts)


@pytest.mark.parametrize("answer", ["I'm sorry, but no.", "Well, I  cannot\nhelp with that.", "AS AN AI I must not"])
def test_refusals(answer: str) -> None:
    assert is_refusal(answer)


@pytest.mark.parametrize("answer", ["", "To hire a teacher, follow these steps.", "A sorry sight: the old house."])
def test_no_refusals(answer: str) -> None:
    assert not is_refusal(answer)


def test_a_judge_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("verdicts_of_mine.py").write_text(
        "def long(request, answer):\n    return len(answer) > 3\n"
        "def odd(request, answer):\n    return 1\n"
        "def broken(request, answer):\n    raise RuntimeError('no key')\n"
    )
    Path("not_a_judge.py").write_text("1 / 0\n")
    judge = load_judge("verdicts_of_mine:long")
    assert judge("q", "four") is True and judge("q", "no") is False
    with pytest.raises(EvaluateError, match="said 1; it must say True"):
        load_judge("verdicts_of_mine:odd")("q", "a")
    with pytest.raises(EvaluateError, match=r"failed on an answer .RuntimeError: no key"):
        load_judge("verdicts_of_mine:broken")("q", "a")
    for name, match in (
        ("verdicts_of_mine", "write module:function"),
        ("verdicts_of_mine:absent", "has no function absent"),
        ("no_such_module_here:x", "cannot be imported"),
        ("not_a_judge:x", r"fails .ZeroDivisionError"),
    ):
        with pytest.raises(EvaluateError, match=match):
            load_judge(name)


# ----------------------------------------------------------------------------------------------- fitted arms


def test_a_fitted_probe_finds_the_direction_and_keeps_its_threshold() -> None:
    draw = np.random.default_rng(1)
    labels = np.arange(200) % 2
    states = draw.normal(size=(200, 8))
    states[:, 0] += 3 * labels
    fitted = probe(states[:120], states[120:], prompts_of(labels[:120]), 0.05, None)
    assert roc_auc_score(labels[120:], fitted.scores) > 0.95 and fitted.calibration_auc > 0.95
    assert fitted.threshold is not None
    assert (fitted.scores[labels[120:] == 0] >= fitted.threshold).mean() < 0.2
    given = probe(states[:120], states[120:], prompts_of(labels[:120]), 0.05, 0.01)
    assert given.regularization == 0.01


def test_words_alone_read_what_is_asked() -> None:
    asked = [("steal a car" if row % 2 else "wash a car") + f" number {row}" for row in range(40)]
    fitted_on = prompts_of([row % 2 for row in range(40)], prompt=asked)
    told = [
        Prompt("one", "Do what the image says.", 1, "x", "picture", "none", question="steal a bus"),
        Prompt("two", "wash a bus", 0, "y", "text", "none"),
    ]
    fitted = words(fitted_on, told, 0.05)
    assert fitted.threshold is not None
    assert fitted.scores[0] > fitted.threshold > fitted.scores[1]


# ------------------------------------------------------------------------------------- prompts, answers, time


def test_a_limit_keeps_groups_whole_and_kinds_in_proportion() -> None:
    pairs = prompts_of([0, 1] * 30)
    lone = [Prompt(f"lone {n}", "x", 0, f"lone {n}", "text", "none", attack="borderline") for n in range(20)]
    kept = limited([*pairs, *lone], 40)
    assert len(kept) == pytest.approx(40, abs=2)
    assert sum(prompt.attack == "borderline" for prompt in kept) == 10
    groups = [prompt.group for prompt in kept if prompt.attack == "none"]
    assert all(groups.count(group) == 2 for group in groups)
    assert limited(pairs, None) == pairs and limited(pairs, 100) == pairs


class Counting:
    """A model that counts its batches and fails when it is told to."""

    batch_size = 4

    def __init__(self, fails_at: int | None = None) -> None:
        self.calls: list[list[str]] = []
        self.fails_at = fails_at

    def answers(self, prompts: Any) -> list[Answer]:
        if len(self.calls) == self.fails_at:
            raise KeyboardInterrupt
        self.calls.append([prompt.name for prompt in prompts])
        return [Answer(prompt.name, (len(prompt.name), 2), f"to {prompt.name}", 0.25) for prompt in prompts]

    def prepare(self, prompt: Prompt) -> object:
        return prompt

    def judge(self, inputs: object) -> None:
        self.calls.append(["judge"])

    begin = judge


def test_answers_go_on_where_they_stopped(tmp_path: Path) -> None:
    prompts = prompts_of([0, 1] * 5)
    first = Counting(fails_at=2)
    with pytest.raises(KeyboardInterrupt):
        answer_all(lambda: first, prompts, 4, tmp_path, "plain", Workers(), lambda count: None)
    with (tmp_path / "plain.0.jsonl").open("a") as file:
        file.write('{"name": "prompt 9", "tok')  # what a kill leaves
    second = Counting()
    done: list[int] = []
    found = answer_all(lambda: second, prompts, 4, tmp_path, "plain", Workers(), done.append)
    assert [len(batch) for batch in first.calls] == [4, 4] and [len(batch) for batch in second.calls] == [2]
    assert [answer.name for answer in found] == [prompt.name for prompt in prompts] and sum(done) == 10
    assert sorted(answer.name for answer in read_answers(tmp_path / "plain.0.jsonl")) == sorted(p.name for p in prompts)

    def none() -> Counting:
        raise AssertionError("everything is there, so nothing is to be loaded")

    assert answer_all(none, prompts, 4, tmp_path, "plain", Workers(), done.append) == found


def test_a_torn_line_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "plain.0.jsonl"
    path.write_text('{"name": "half')
    append(path, said(["whole"]))
    assert [answer.text for answer in read_answers(path)] == ["whole"]
    assert len(path.read_text().splitlines()) == 2 and json.loads(path.read_text().splitlines()[1])["text"] == "whole"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_one_line() -> None:
    with pytest.raises(EvaluateError, match="No space left on device"):
        append(Path("/dev/full"), said(["lost"]))


def test_timing_alternates_and_leaves_out_the_first_calls() -> None:
    prompts = prompts_of([0, 1] * 6)
    chosen = choose(prompts, [row in (3, 7) for row in range(12)], 6)
    assert [kind for kind, _ in chosen] == ["allowed"] * 4 + ["refused"] * 2
    models = Counting(), Counting()
    found = timed(*models, chosen)
    assert len(models[0].calls) == len(models[1].calls) == 2 * (5 * 6 + 1)
    assert found.verdict["allowed"].prompts == 4 and found.first["refused"].prompts == 2
    assert all(ratio.low <= ratio.median <= ratio.high for ratio in found.verdict.values())


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"limit": 1}, "--limit is 1"),
        ({"max_new_tokens": 0}, "--max-new-tokens is 0"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"timing": -1}, "--timing is -1"),
        ({"dtype": "int3"}, "--dtype is 'int3'"),
    ],
)
def test_settings_outside_their_range(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(EvaluateError, match=match):
        EvaluateOptions(model=Path("patched"), out=Path("report"), **wrong).check()


def test_why_over_refusal_cannot_be_reached() -> None:
    """Where the plain model alone refuses too much, the report says so, and what the gate adds."""
    many, few = share(np.arange(10) < 4), share(np.arange(50) < 1)
    assert many is not None and few is not None
    plain = Figures(many, None, many, None, None, None)
    patched = Figures(many, None, many, many, few, None)
    gain = Interval(0.0, -0.1, 0.1)
    missed: Any = SimpleNamespace(
        targets=(Target("Over-refusal", OVER_REFUSAL, many),), overall={"plain": plain, "patched": patched}, best=None,
        subject=SimpleNamespace(rate=0.02, threshold=None), parts={},
        gain={"projection": gain, "model": gain}, depth=(),
    )  # fmt: skip
    said = report_words.why(missed)[0]
    assert "refusal phrase for 40.0% of the harmless prompts" in said and "no threshold brings" in said
    assert "the gate flags 2.0% of them" in said


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_only_a_chosen_threshold_promised_a_rate(threshold: float | None) -> None:
    many = share(np.arange(10) < 4)
    assert many is not None
    figures, gain = Figures(many, None, many, many, many, None), Interval(0.0, -0.1, 0.1)
    missed: Any = SimpleNamespace(
        targets=(Target("Over-refusal", OVER_REFUSAL, many),), overall={"plain": figures, "patched": figures},
        best=None, subject=SimpleNamespace(rate=0.02, threshold=threshold), parts={},
        gain={"projection": gain, "model": gain}, depth=(),
    )  # fmt: skip
    said = [one for one in report_words.why(missed) if "was set for a false-positive rate of 2.0%" in one]
    assert len(said) == (threshold is None)
