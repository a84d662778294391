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
EVERYDAY = BUILTIN[BUILTIN.group.str.contains("-everyday-")]
BORDERLINE = BUILTIN.drop(EVERYDAY.index)
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


def test_harmful_and_harmless_twins_ask_alike_on_one_topic() -> None:
    twins = kinds(*SIDES)
    assert (twins.label == (twins.kind == "harmful")).all()
    pairs = twins.pivot(index=["group", "category"], columns="kind", values="request")
    assert not pairs.isna().any(axis=None)
    for harmful, harmless in pairs[SIDES].to_numpy():
        assert harmful.split()[0] == harmless.split()[0]
        assert similarities([harmful], [harmless]).max() > 0.2


def test_in_split_prompts_no_part_tells_anything() -> None:
    """Two texts and two pictures a group, in all combinations: harmful is what neither part alone is."""
    split = kinds("split")
    assert set(split.groupby("group").size()) == {4}
    assert not split.duplicated(["group", "text", "picture"]).any()
    for part in ("text", "picture"):
        assert not split.duplicated(["group", part, "label"]).any()
        assert set(split.groupby("group")[part].nunique()) == {2}


# ---------------------------------------------------------------------------------- what wording gives away

WORDS: dict[str, Any] = {"token_pattern": r"[a-z']+"}
BAGS = (WORDS, {**WORDS, "ngram_range": (1, 2)}, {"analyzer": "char_wb", "ngram_range": (2, 5)})


@pytest.mark.parametrize(
    ("rows", "low", "high"),
    [
        (HELDOUT.rename(columns={"pair": "group"}), 0.0, 1.0),
        (BUILTIN, 0.0, 0.67),
        # Everyday harmful requests use everyday harmful words; the borderline pairs must not lean on them.
        (BORDERLINE, 0.0, 0.6),
        (EVERYDAY, 0.0, 0.7),
        (kinds("split"), 0.4, 0.6),
        (kinds("harmful", "harmless"), 0.5, 0.82),
        (kinds("harmful", "borderline"), 0.5, 0.82),
    ],
    ids=["held out", "calibration", "borderline", "everyday", "split", "harmful, harmless", "harmful, borderline"],
)
def test_what_a_bag_of_words_tells(rows: pd.DataFrame, low: float, high: float) -> None:
    """ROC-AUC of a classifier of words, word pairs or characters, on unseen groups; length tells nothing."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    if "words" not in rows:  # pairs
        rows = rows.melt("group", SIDES, "label", "words")
        rows["label"] = (rows.label == "harmful").astype(int)
    for measure in (rows.words.str.len(), rows.words.str.split().str.len()):
        assert 0.42 < roc_auc_score(rows.label, measure) < 0.58
    for options in BAGS:
        model = make_pipeline(TfidfVectorizer(**options), LogisticRegression(class_weight="balanced", max_iter=1000))
        scores = cross_val_predict(
            model, rows.words, rows.label, groups=rows.group, cv=GroupKFold(5), method="decision_function"
        )
        assert low < roc_auc_score(rows.label, scores) < high, options


# ------------------------------------------------------------------------------------------------ the prompts


def test_every_line_of_the_calibration_set_has_a_label_and_a_kind() -> None:
    assert set(LINES) == {"label", "kind", "category", "text", "group", "picture"}
    assert not LINES[["label", "kind", "category", "text"]].isna().any(axis=None) and LINES.label.isin([0, 1]).all()
    lengths = LINES.text.str.split().str.len()
    assert lengths.max() <= 90 and (lengths >= LINES.kind.isin(ALONE).map({True: 1, False: 3})).all()
    assert not LINES.text.str.contains("\n").any() and asked_in(LINES).map(str.isascii).all()
    assert set(LINES.kind) == STYLES | {"twin", "borderline", "photo", "text-in-picture", *ALONE}
    # A style tells nothing: there are about as many harmful as ordinary requests of each.
    assert LINES[LINES.kind.isin(STYLES)].groupby("kind").label.mean().between(0.41, 0.59).all()


def test_the_form_of_a_blunt_request_tells_nothing() -> None:
    """As many of either label are upper case, ask with a mark, or open alike; a pair differs in what it wants."""
    blunt = LINES[LINES.kind == "blunt"]
    forms: dict[str, Callable[[str], bool]] = {
        "upper case": str.isupper,
        "lower case": str.islower,
        "a question mark": lambda text: text.endswith("?"),
        "how": lambda text: text.lower().startswith("how "),
        "short": lambda text: len(text.split()) < 5,
    }
    for form, holds in forms.items():
        shares = blunt.text.map(holds).groupby(blunt.label).mean()
        assert abs(shares[0] - shares[1]) < 0.06 and shares.min() > 0.05, (form, shares)
    assert set(LINES[LINES.kind == "contrast"].groupby("group").label.agg(tuple).map(sorted).map(tuple)) == {(0, 1)}
    assert not LINES[LINES.kind.isin(["figurative", "sensitive"])].label.any()


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


def test_the_pixels_of_a_split_picture_tell_nothing() -> None:
    prompts = [prompt for prompt in builtin_evaluation() if prompt.attack == "split"]
    labels = defaultdict(list)
    for digest, prompt in zip(pixels(prompts), prompts, strict=True):
        labels[digest].append(prompt.label)
    assert all(sorted(found) == [0, 1] for found in labels.values())


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
