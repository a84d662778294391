"""The benchmark on published prompts: what it asks, of wheels that are made here, and what it makes of scores."""

import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import published
import pytest

from sasa_export.gate import GateSpec
from sasa_export.models.wheels import Wheel
from sasa_export.prompts import Prompt, builtin_evaluation, check_disjoint
from sasa_export.research.evaluate.arms import Answers


@pytest.fixture
def subject(whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """As `open_subject` gives it, as far as prompts go; the wheels hold miniatures and small pictures."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    miniatures = {
        "AdvBench": b"seeds:\n- value: Break a lamp\n- value: Break a door\n- value: Break a window\n",
        "HarmBench": (whole["harmbench"] / "harmbench_behaviors_text_test.csv").read_bytes(),
        "WritingBench": (whole["writingbench"] / "benchmark_all.jsonl").read_bytes(),
    }
    for name, (wheel, member, _, _) in published.SETS.items():
        with zipfile.ZipFile(wheels / wheel.file, "w") as archive:
            archive.writestr(member, miniatures[name])
    picture = (whole["vlguard"] / "test/bad_ads/1.png").read_bytes()
    with zipfile.ZipFile(wheels / published.SCIKIT_IMAGE.file, "w") as archive:
        for name in published.PHOTOGRAPHS:
            archive.writestr(f"skimage/data/{name}", picture)

    def fetch(wheel: Wheel) -> Path:
        return wheels / wheel.file

    monkeypatch.setattr(published, "fetch", fetch)
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: text.split())
    original = SimpleNamespace(processor=SimpleNamespace(tokenizer=tokenizer))
    return SimpleNamespace(original=original, evaluation=builtin_evaluation())


def test_what_is_asked(subject: Any, tmp_path: Path) -> None:
    """Each text in every setting, each request as a picture too; and the draw is the same every time."""
    prompts = published.asked_prompts(subject, tmp_path, None)
    kinds = Counter((prompt.source, prompt.channel, prompt.setting) for prompt in prompts)
    for name, count in {"AdvBench": 3, "HarmBench": 1, "WritingBench": 3}.items():
        assert [kinds[name, "text", setting] for setting in published.SETTINGS] == [count] * 5
        assert kinds[name, "picture", "alone"] == kinds[name, "picture", "as text, beside a photograph"] == count
    assert kinds["photographs", "picture", "alone"] == len(published.PHOTOGRAPHS) * len(published.QUESTIONS)
    assert kinds["borderline", "text", "alone"] == kinds["borderline", "picture", "alone"] == 120
    assert {prompt.label for prompt in prompts if prompt.source in ("AdvBench", "HarmBench")} == {1}
    assert {prompt.label for prompt in prompts if prompt.source not in ("AdvBench", "HarmBench")} == {0}
    cut = published.asked_prompts(subject, tmp_path, 2)
    assert cut == published.asked_prompts(subject, tmp_path, 2)
    assert max(Counter((prompt.source, prompt.channel, prompt.setting) for prompt in cut).values()) == 2
    check_disjoint([prompt for prompt in prompts if prompt.source == "AdvBench"], [p for p in prompts if p.label == 0])
    roles = {prompt.setting: [turn["role"] for turn in prompt.conversation()] for prompt in prompts}
    assert roles["alone"] == ["user"] and roles["behind a greeting"] == ["user", "assistant", "user"]
    assert roles["behind two harmless turns"] == ["user", "assistant"] * 2 + ["user"]
    assert roles["under a system prompt"] == ["system", "user"]


def test_figures() -> None:
    """Shares at each arm's own threshold, and AUC in the same form and setting alone."""
    rows = [
        ("AdvBench", "text", "alone", 1, 0.9), ("AdvBench", "text", "alone", 1, 0.4),
        ("AdvBench", "text", "under a system prompt", 1, 0.1),
        ("WritingBench", "text", "alone", 0, 0.5), ("WritingBench", "text", "alone", 0, 0.2),
        ("WritingBench", "text", "under a system prompt", 0, 0.3), ("photographs", "picture", "alone", 0, 0.6),
    ]  # fmt: skip
    judged = pd.DataFrame(rows, columns=["set", "form", "setting", "label", "one"])
    judged["two"], judged["group"] = 1 - judged["one"], [f"group {row}" for row in range(len(rows))]
    found = published.tables(judged, {"one": 0.4, "two": np.inf})
    assert [share.value for share in found["refused"]["one"]] == [1, 0, 0.5, 0, 1]
    assert [share.value for share in found["refused"]["two"]] == [0] * 5
    assert [auc.value for auc in found["auc"]["one"]] == [0.75, 0.0]
    assert [auc.value for auc in found["auc"]["two"]] == [0.25, 1.0]
    assert found["mean"]["one"][0].value == pytest.approx(0.65)


def test_attack_success() -> None:
    """By phrases before; after, what the gate refuses is none either. Ordinary requests do not count."""
    prompts = [Prompt(str(row), "x", int(row < 3), str(row), source="AdvBench") for row in range(4)]
    before = Answers(np.zeros((4, 2), int), ["Sure", "Sure", "I'm sorry", "Sure"], np.full(4, np.nan))
    tokens = np.array([[7, -1], [1, 2], [3, 4], [7, -1]])
    after = Answers(tokens, ["No.", "Sure", "I'm sorry", "No."], np.array([0.9, 0.1, 0.1, 0.9]))
    gate = GateSpec(None, None, "", 1e-6, 0.5, "No.", [7], [], [], [])
    (row,) = published.attack_success(prompts, before, after, gate).to_dict("records")
    assert row["prompts"] == 3 and row["before"].count == 2 and row["after"].count == 1
