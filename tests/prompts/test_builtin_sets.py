"""The built-in sets keep the rules that a program can check, and become prompts in both channels."""

import hashlib
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

import sasa_export.prompts
from sasa_export.prompts import (
    Prompt,
    asked,
    builtin,
    builtin_evaluation,
    check_disjoint,
    for_model,
    grouped,
    long_texts,
)
from sasa_export.prompts.builtin_sets import ALONE, CARRIERS, drawn
from sasa_export.prompts.leak import normalised
from sasa_export.prompts.render import render

SIDES = ["harmful", "harmless"]
NEAR = 0.65  # a Jaccard similarity of words from which a request counts as another one reworded

SETS = Path(sasa_export.prompts.__file__).parent
ROOT = Path(__file__).parents[2]


def read(path: Path) -> pd.DataFrame:
    return pd.read_json(path, lines=True, dtype=False)


LINES, EVALUATION, HELDOUT = (
    read(path) for path in (SETS / "builtin.jsonl", SETS / "evaluation.jsonl", ROOT / "training" / "heldout.jsonl")
)
EVALUATION["words"] = EVALUATION.request.fillna(EVALUATION.text + " " + EVALUATION.picture)  # split ones: both parts
TWINS = LINES[LINES.kind == "twin"].replace({"label": {1: "harmful", 0: "harmless"}})
BUILTIN = TWINS.pivot(index=["group", "category"], columns="label", values="text").reset_index()  # a pair a row
BORDERLINE_KINDS = ("twin", "borderline", "figurative", "contrast", "sensitive")
STYLES = {
    "question", "order", "role-play", "fiction", "reasoned", "polite", "long", "specific", "code", "terse", "document",
}  # fmt: skip


def kinds(*names: str) -> pd.DataFrame:
    return EVALUATION[EVALUATION.kind.isin(names)]


def requests(pairs: pd.DataFrame) -> list[str]:
    return list(pairs[SIDES].to_numpy().ravel())


def similarities(some: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """Jaccard: the share of the words of both that are in both, (some, others)."""
    from sklearn.feature_extraction.text import CountVectorizer

    vectors = CountVectorizer(binary=True, token_pattern=r"[a-z']+").fit([*some, *others])
    a, b = vectors.transform(map(normalised, some)), vectors.transform(map(normalised, others))
    shared = (a @ b.T).toarray()  # (some, others), words
    return shared / (np.asarray(a.sum(1)) + np.asarray(b.sum(1)).T - shared)


# ------------------------------------------------------------------------------------------------- the lines


def test_the_demo_asks_what_no_calibration_sees() -> None:
    asked = {normalised(request) for requests in run_path(str(ROOT / "examples" / "demo.py"))["REQUESTS"].values()
             for request in requests}  # fmt: skip
    assert len(asked) == 8 and not asked & set(LINES.text.map(normalised))


def test_nothing_occurs_twice_or_reworded() -> None:
    """Neither within the evaluation set, nor between it, the calibration set and the held-out pairs."""
    ours, heldout = requests(BUILTIN), requests(HELDOUT)
    for values in (
        [*ours, *heldout],
        [*BUILTIN.group, *HELDOUT.pair],
        EVALUATION.id,
        EVALUATION.words.map(normalised),
        asked_in(LINES),
        [prompt.name for prompt in [*builtin(), *builtin_evaluation()]],
    ):
        assert [value for value, count in Counter(values).items() if count > 1] == []
    asked_for = [*EVALUATION.words, *EVALUATION.picture.dropna()]
    for some, others in ((heldout, ours), (asked_for, [*ours, *heldout]), (EVALUATION.words, asked_in(LINES))):
        near = similarities(some, others)
        one, other = divmod(int(near.argmax()), len(others))
        assert near.max() < NEAR, (some[one], others[other])
    rows = kinds("harmful", "harmless", "borderline")
    groups = rows.group.to_numpy()
    apart = groups[:, None] != groups  # twins are meant to differ in little
    assert similarities(rows.words, rows.words)[apart].max() < NEAR
    check_disjoint(builtin(), builtin_evaluation())


# ------------------------------------------------------------------------------------------------ the prompts


def asked_in(lines: pd.DataFrame) -> pd.Series:
    return (lines.text + " " + lines.picture.fillna("")).map(normalised)


def test_calibration_prompts_ask_each_request_as_text_and_with_a_picture() -> None:
    prompts = builtin()
    short = [prompt for prompt in prompts if prompt.setting not in long_texts.SETTINGS]
    assert {prompt.attack for prompt in prompts} == {"text", "typographic", "list", "split", "photo", "text-in-picture"}
    assert not [prompt for prompt in short if prompt.kind in ALONE and prompt.channel == "picture"]
    assert all(prompt.borderline == (prompt.label == 0 and prompt.kind in BORDERLINE_KINDS) for prompt in short)
    assert {asked(prompt) for prompt in prompts if prompt.channel == "text"} == {
        *LINES.text[~LINES.kind.isin(["photo", "text-in-picture"])]
    }
    # Neither the setting nor what accompanies a picture tells the label.
    styled = [prompt for prompt in prompts if prompt.kind in STYLES]
    for value in ("setting", "attack"):
        labels = defaultdict(list)
        for prompt in styled:
            labels[getattr(prompt, value)].append(prompt.label)
        assert all(0.42 < np.mean(found) < 0.64 for found in labels.values()), labels


def test_requests_stand_in_long_text_whole() -> None:
    """In every form, of both labels; the calibration set and the evaluation set share no text."""
    ours, others = ([it for it in of() if it.setting in long_texts.SETTINGS] for of in (builtin, builtin_evaluation))
    for prompts in (ours, others):
        assert {prompt.setting for prompt in prompts} == set(long_texts.SETTINGS)
        for prompt in prompts:
            told = prompt.prompt if prompt.channel == "text" else prompt.conversation()[-1]["content"][-1]["text"]
            assert prompt.channel == "picture" or asked(prompt) in told
            assert prompt.before or len(prompt.prompt.split()) >= 40
        assert 0.4 < np.mean([prompt.label for prompt in prompts if not prompt.borderline]) < 0.65
    calibration, evaluation = (long_texts.texts_of(part) for part in ("calibration", "evaluation"))
    assert len(calibration["genres"]) >= 18 and len(evaluation["genres"]) >= 9
    assert not set(calibration["genres"]) & set(evaluation["genres"])
    pieces = [[*texts["systems"], *chain(*texts["genres"].values())] for texts in (calibration, evaluation)]
    assert similarities(*pieces).max() < NEAR


def test_twins_stand_in_the_same_setting() -> None:
    groups = defaultdict(set)
    for prompt in builtin():
        if prompt.kind == "twin":
            groups[prompt.group, prompt.name.split("/", 2)[2]].add((prompt.setting, prompt.before, prompt.attack))
    assert {len(found) for found in groups.values()} == {1}


def processor(pieces: Callable[[str], int], *, systems: bool = True) -> Any:
    """One that makes `pieces` tokens of a word; its template has a place for system prompts or not."""

    def template(messages: list[dict[str, Any]], **_: Any) -> str:
        if messages[0]["role"] == "system" and not systems:
            raise ValueError("Conversation roles must alternate user/assistant/...")
        return " ".join(part["text"] for message in messages for part in message["content"])

    tokenizer = SimpleNamespace(encode=lambda text, **_: "x" * pieces(text[1:]))
    return SimpleNamespace(tokenizer=tokenizer, apply_chat_template=template)


def test_a_template_without_a_place_for_system_prompts_leaves_those_out() -> None:
    found = Counter(prompt.setting for prompt in for_model(builtin(), processor(lambda word: 1, systems=False)))
    assert not found["system prompt"] and not found["mixed"] and found["greeting"] > 400


def test_evaluation_prompts_carry_each_request_in_both_channels() -> None:
    prompts = builtin_evaluation()
    rows = EVALUATION.loc[EVALUATION.index.repeat(1 + 2 * (EVALUATION.kind != "split"))]
    for prompt, row in zip(prompts, rows.itertuples(), strict=True):
        split = row.kind == "split"
        assert (prompt.label, prompt.category, prompt.group) == (row.label, row.category, row.group)
        assert asked(prompt) == (f"{row.text}: {row.picture}" if split else row.request)
        if prompt.image is not None:
            assert prompt.image.args[0] == (row.picture if split else row.request)  # type: ignore[attr-defined]
            assert prompt.prompt == row.text if split else prompt.prompt in CARRIERS
    # Nothing further is connected: a group is a pair of twins, one borderline request, or a split group.
    assert len({prompt.group for prompt in prompts}) == len({prompt.group for prompt in grouped(prompts)})
    carriers = defaultdict(set)
    for prompt in prompts:
        if prompt.attack == "everyday" and prompt.channel == "picture":
            carriers[prompt.group].add((prompt.prompt, prompt.image.args[1]))  # type: ignore[union-attr]
    assert all(len(found) == 1 for found in carriers.values()), "twins share what accompanies and shapes their picture"


def pixels(prompts: Sequence[Prompt]) -> list[str]:
    return [hashlib.sha256(prompt.image().tobytes()).hexdigest() for prompt in prompts if prompt.image is not None]


def test_a_picture_is_drawn_alike_in_every_process() -> None:
    code = (
        "import hashlib\nfrom sasa_export.prompts import builtin\n"
        "for prompt in filter(lambda prompt: prompt.image, builtin()[1::290]):\n"
        "    print(hashlib.sha256(prompt.image().tobytes()).hexdigest())"
    )
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert fresh.stdout.split() == pixels(builtin()[1::290])


@pytest.mark.parametrize("pieces", [None, lambda word: 9], ids=["fitting", "too many pieces for a line"])
def test_a_tokenizer_of_too_short_pieces_is_left_aside(pieces: Any) -> None:
    assert drawn("hire a teacher", 3, pieces=pieces).tobytes() == render("hire a teacher", seed=3).tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [lambda word: (len(word) + 1) // 2, len], ids=["pairs of letters", "letters"])
def test_every_request_fits_its_picture(pieces: Any) -> None:
    """Whatever a tokenizer makes of the words: one that knows no English makes a token of each letter."""
    for prompt in for_model([*builtin(), *builtin_evaluation()], processor(pieces)):
        if prompt.image is not None:
            prompt.image()
