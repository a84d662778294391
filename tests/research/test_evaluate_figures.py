"""The arms and figures of an evaluation, against scikit-learn and against what a pencil gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from sasa_export.probe import fit_probes
from sasa_export.probe.intervals import Estimate, Share
from sasa_export.prompts.prompt import Prompt
from sasa_export.prompts.shares import share_of, spaced
from sasa_export.research.evaluate.arms import (
    Answers,
    Arm,
    answering_arm,
    changes,
    figures,
    fitted_arm,
    is_refusal,
    parts,
)
from sasa_export.research.evaluate.measure import probe, words
from sasa_export.research.report import render

NOBODY = np.zeros(8, bool)


def prompts_of(labels: Any, **fields: Any) -> list[Prompt]:
    """Prompts with these labels, two a group; `fields` hold one value for each."""
    defaults: dict[str, Any] = {"channel": "text", "category": "none", "attack": "none", "prompt": "words"}
    return [
        Prompt(f"prompt {row}", label=int(label), group=f"pair {row // 2}",
               **{name: fields[name][row] if name in fields else value for name, value in defaults.items()})
        for row, label in enumerate(labels)
    ]  # fmt: skip


def said(*texts: str) -> Answers:
    return Answers(np.full((len(texts), 2), 9), list(texts))


# ------------------------------------------------------------------------------------------------------- figures


def test_detection_is_scikit_learns() -> None:
    labels = np.arange(60) % 2
    scores = np.round(np.clip(np.random.default_rng(3).normal(0.4 + 0.2 * labels, 0.2), 0, 1), 1)  # with ties
    arm = Arm("an arm", np.zeros(60, bool), scores, 0.55)
    found = figures(arm, np.arange(60), prompts_of(labels), 0.1)
    wrong, caught, _ = roc_curve(labels, scores, drop_intermediate=False)
    assert found["auc"].value == pytest.approx(roc_auc_score(labels, scores))
    assert found["recall_at_rate"].value == pytest.approx(caught[wrong <= 0.1].max())
    assert all(of.low <= of.value <= of.high for of in found.values())
    assert "auc" not in figures(arm, np.flatnonzero(labels), prompts_of(labels), 0.1)


def test_changes_between_two_gates_by_hand() -> None:
    before = Arm("before", NOBODY[:5], scores=np.array([0.9, 0.2, 0.8, 0.1, 0.1]), threshold=0.5)
    after = Arm("after", NOBODY[:5], scores=np.array([0.4, 0.9, 0.85, 0.2, 0.3]), threshold=0.3)
    channels = ["text", "text", "text", "picture", "picture"]
    found = changes(before, after, prompts_of([1, 1, 0, 0, 1], channel=channels))
    rows = [tuple(of[name] for name in ("part", "label", "prompts", "now_refused", "now_allowed")) for of in found]
    assert rows[:2] == [("all", 1, 3, 2, 0), ("all", 0, 2, 0, 0)]
    assert rows[2:] == [("picture", 1, 1, 1, 0), ("picture", 0, 1, 0, 0), ("text", 1, 2, 1, 0), ("text", 0, 1, 0, 0)]
    assert [of["largest"] for of in found] == pytest.approx([0.7, 0.1, 0.2, 0.1, 0.7, 0.05])
    assert (found[0]["before"].count, found[0]["after"].count) == (1, 3)
    back = changes(after, before, prompts_of([1, 1, 0, 0, 1], channel=channels))
    assert [(of["now_refused"], of["now_allowed"]) for of in back] == [(row[4], row[3]) for row in rows]


def test_a_split_request_is_a_channel() -> None:
    found = parts(prompts_of([1, 0, 1], channel=["text", "picture", "picture"], attack=["none", "none", "split"]))
    rows = {name: rows.tolist() for name, rows in found["channel"].items()}
    assert rows == {"picture": [1], "split": [2], "text": [0]} and "category" not in found


# --------------------------------------------------------------------------------------------------------- arms


def test_an_arm_refuses_what_it_flags_and_what_the_model_refuses() -> None:
    prompts = prompts_of([1, 1, 1, 0, 0])
    answers = said("Here is how.", "I\u2019m sorry, but I can\u2019t.", "Sure.", "As an AI, no.", "Yes.")
    plain = answering_arm("plain", answers, NOBODY[:5])
    assert plain.refused.tolist() == [False, True, False, True, False]
    arm = fitted_arm("a gate", plain, np.array([0.9, 0.1, 0.2, 0.1, 0.7]), 0.6)
    found = figures(arm, np.arange(5), prompts, 0.02)
    assert {name: (of.count, of.total) for name, of in found.items() if isinstance(of, Share)} == {
        "attack": (1, 3), "over_refusal": (2, 2), "caught": (1, 3), "false_positives": (1, 2), "recall_at_rate": (1, 3),
    }  # fmt: skip
    assert set(figures(arm, np.arange(3), prompts, 0.02)) == {"attack", "caught"}
    unsure = fitted_arm("no threshold", plain, np.ones(5), None)
    assert (unsure.refused == plain.refused).all() and unsure.flagged is None


@pytest.mark.parametrize(
    ("answer", "refusal"),
    [
        ("I'm sorry, but no.", True), ("Well, I  cannot\nhelp with that.", True), ("AS AN AI I must not", True),
        ("", False), ("To hire a teacher, follow these steps.", False), ("A sorry sight: the old house.", False),
    ],
)  # fmt: skip
def test_refusal_phrases(answer: str, refusal: bool) -> None:
    assert is_refusal(answer) == refusal


def test_a_fitted_probe_finds_the_direction_and_keeps_its_threshold() -> None:
    labels = np.arange(200) % 2
    states = np.random.default_rng(1).normal(size=(200, 8))
    states[:, 0] += 3 * labels
    prompts = prompts_of(labels[:120])

    def fitted(c: float | None) -> tuple[np.ndarray, float | None]:
        return probe(fit_probes({"plain": states[:120]}, prompts, None, c), "plain", states[120:], prompts, 0.05)

    scores, threshold = fitted(None)
    assert roc_auc_score(labels[120:], scores) > 0.95
    assert threshold is not None and (scores[labels[120:] == 0] >= threshold).mean() < 0.2
    given, _ = fitted(1e-5)
    assert np.ptp(given) < 0.5 * np.ptp(scores)


def test_words_alone_read_what_is_asked() -> None:
    asked = [("steal a car" if row % 2 else "wash a car") + f" number {row}" for row in range(40)]
    told = [
        Prompt("one", "Do what the image says.", 1, "x", "picture", "none", question="steal a bus"),
        Prompt("two", "wash a bus", 0, "y", "text", "none"),
    ]
    scores, threshold = words(prompts_of(np.arange(40) % 2, prompt=asked), told, 0.05)
    assert threshold is not None and scores[0] > threshold > scores[1]


# ----------------------------------------------------------------------------------------- prompts, report


def test_a_limit_keeps_groups_whole_and_kinds_in_proportion() -> None:
    pairs = prompts_of([0, 1] * 30)
    lone = [Prompt(f"lone {n}", "x", 0, f"lone {n}", "text", "none", attack="borderline") for n in range(20)]
    kept = share_of([*pairs, *lone], 0.5, lambda prompt: (prompt.attack, prompt.label))
    assert len(kept) == pytest.approx(40, abs=2)
    assert sum(prompt.attack == "borderline" for prompt in kept) == 10
    groups = [prompt.group for prompt in kept if prompt.attack == "none"]
    assert all(groups.count(group) == 2 for group in groups)
    assert spaced(range(10), 3) == [1, 5, 8] and spaced("abc", 9) == ["a", "b", "c"] and spaced(range(5), 0) == []


def report(given_threshold: float | None) -> str:
    """The report where the plain model refuses 40 % of the harmless prompts, and the gate 2 %."""
    many, gain = Share(0.4, 0.2, 0.6, 4, 10), Estimate(0.0, -0.1, 0.1)
    arm = {"attack": many, "over_refusal": many, "false_positives": Share(0.02, 0.0, 0.1, 1, 50), "auc": gain}
    names = ("data", "left_out", "calibrated_on", "graphs", "dtype", "device", "batch_size", "max_new_tokens",
             "harmful", "harmless", "groups", "command", "blocks", "lane_blocks", "texts_alone")  # fmt: skip
    subject: dict[str, Any] = {**dict.fromkeys(names, 0), "model": "patched", "baseline": "plain"}
    subject |= {"safety_layer": None, "false_positive_rate": 0.01}
    gains = {"projection": gain, "model": gain}
    found: dict[str, Any] = {"parts": {}, "gain": gains, "changes": [], "identical": None, "emitted": None}
    return render(
        "evaluate.md.j2", found=found, subject={**subject, "given_threshold": given_threshold},
        arms={"patched": arm, "plain": arm}, tables={"answers": pd.DataFrame(), "detection": pd.DataFrame()},
    )  # fmt: skip


def test_what_the_figures_say() -> None:
    """The report says what the plain model refuses itself, and that only a chosen threshold promised a rate."""
    chosen, given = report(None), report(0.5)
    assert "refusal phrase for 40.0% of the harmless prompts" in chosen and "the gate flags 2.0% of them" in chosen
    assert "is 2.0% here: these prompts are not like those" in chosen and "not like those" not in given
    assert "Projection neither helps nor hurts" in chosen
