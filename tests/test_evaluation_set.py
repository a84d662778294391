"""The built-in evaluation set keeps its rules, and the calibration requests are not in it."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sasa_export
from sasa_export.prompts import asked, check_disjoint
from sasa_export.prompts.builtin_evaluation import builtin_evaluation
from sasa_export.prompts.leak import normalised
from sasa_export.prompts.prompt import builtin

FILE = Path(sasa_export.__file__).parent / "datasets" / "evaluation.jsonl"
ROWS: list[dict[str, Any]] = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
CATEGORIES, TYPES = 15, 8
LINE = re.compile(r"[a-z']+(,? [a-z']+)*")
NEAR = 0.65  # a Jaccard similarity of words from which a request counts as another one reworded


def kinds(*names: str) -> list[dict[str, Any]]:
    return [row for row in ROWS if row["kind"] in names]


def words(row: dict[str, Any]) -> str:
    return f"{row['text']} {row['picture']}" if row["kind"] == "split" else str(row["request"])


def similarity(one: str, other: str) -> float:
    """Jaccard: the share of the words of both that are in both."""
    a, b = set(one.split()), set(other.split())
    return len(a & b) / len(a | b)


def calibration_requests() -> list[str]:
    return [asked(prompt) for name in ("builtin", "heldout") for prompt in builtin(None, name)]


def test_sizes_and_labels():
    found = Counter((row["kind"], row["label"]) for row in ROWS)
    assert found == {
        ("harmful", 1): 150,
        ("harmless", 0): 150,
        ("borderline", 0): 120,
        ("split", 1): 60,
        ("split", 0): 60,
    }
    common = ["id", "group", "kind", "category", "label"]
    further = {"harmful": ["request"], "harmless": ["request"], "borderline": ["type", "request"]}
    for row in ROWS:
        assert list(row) == common + further.get(row["kind"], ["text", "picture"]), row["id"]


def test_categories_are_balanced():
    categories = {row["category"] for row in ROWS}
    assert len(categories) == CATEGORIES
    for kind, each in (("harmful", 10), ("harmless", 10), ("borderline", TYPES)):
        assert set(Counter(row["category"] for row in kinds(kind)).values()) == {each}
    assert set(Counter((row["category"], row["label"]) for row in kinds("split")).values()) == {4}
    grid = Counter((row["category"], row["type"]) for row in kinds("borderline"))
    assert len({kind for _, kind in grid}) == TYPES
    assert len(grid) == CATEGORIES * TYPES  # each type of borderline once in each category


def test_requests_are_short_plain_lines():
    for row in ROWS:
        text = str(row.get("request", row.get("text")))
        assert LINE.fullmatch(text) and 4 <= len(text.split()) <= 14, text
        assert row["kind"] != "split" or (LINE.fullmatch(row["picture"]) and len(row["picture"].split()) <= 8), row


def test_nothing_occurs_twice():
    for values in (
        [row["id"] for row in ROWS],
        [normalised(words(row)) for row in ROWS],
        [record.name for record in builtin_evaluation(None)],
    ):
        assert [value for value, count in Counter(values).items() if count > 1] == []


def test_no_request_is_a_reworded_other_one():
    rows = kinds("harmful", "harmless", "borderline")
    for place, row in enumerate(rows):
        for other in rows[:place]:
            if other["group"] != row["group"]:  # twins are meant to differ in little
                assert similarity(words(row), words(other)) < NEAR, (words(row), words(other))


def test_no_request_is_a_calibration_request_or_one_reworded():
    records = builtin_evaluation(None)
    known = calibration_requests()
    assert not {normalised(asked(record)) for record in records} & {normalised(text) for text in known}
    for row in ROWS:
        for part in (words(row), str(row.get("picture", words(row)))):
            nearest = max(known, key=lambda other: similarity(part, other))
            assert similarity(part, nearest) < NEAR, (part, nearest)
    # Pictures are drawn from the questions, so that theirs need not be compared.
    check_disjoint(*([replace(record, image=None) for record in part] for part in (builtin(None), records)))


def test_harmful_and_harmless_twins_ask_alike_on_one_topic():
    groups: dict[str, dict[str, Any]] = defaultdict(dict)
    for row in kinds("harmful", "harmless"):
        groups[row["group"]][row["kind"]] = row
    assert len(groups) == 150
    for pair in groups.values():
        harmful, harmless = pair["harmful"], pair["harmless"]
        assert harmful["category"] == harmless["category"]
        assert harmful["request"].split()[0] == harmless["request"].split()[0]
        assert similarity(harmful["request"], harmless["request"]) > 0.2


def test_in_split_prompts_no_part_tells_anything():
    """Two texts and two pictures a group, in all combinations: harmful is what neither part alone is."""
    groups = defaultdict(list)
    for row in kinds("split"):
        groups[row["group"]].append(row)
    assert len(groups) == 30
    for rows in groups.values():
        assert len({(row["text"], row["picture"]) for row in rows}) == len(rows) == 4
        for part in ("text", "picture"):
            seen = Counter((row[part], row["label"]) for row in rows)
            assert len(seen) == 4 and set(seen.values()) == {1}


WORDS = {"token_pattern": r"[a-z']+"}
PAIRS = {**WORDS, "ngram_range": (1, 2)}
CHARACTERS = {"analyzer": "char_wb", "ngram_range": (2, 5)}


def auc_across_groups(rows: list[dict[str, Any]], options: dict[str, Any]) -> float:
    """ROC-AUC of a bag-of-words classifier on groups it was not fitted on."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    labels = np.array([row["label"] for row in rows])
    scores = cross_val_predict(
        make_pipeline(TfidfVectorizer(**options), LogisticRegression(class_weight="balanced", max_iter=1000)),
        [words(row) for row in rows],
        labels,
        groups=[row["group"] for row in rows],
        cv=GroupKFold(5),
        method="decision_function",
    )
    return float(roc_auc_score(labels, scores))


@pytest.mark.parametrize("options", [WORDS, PAIRS, CHARACTERS], ids=["words", "word pairs", "characters"])
@pytest.mark.parametrize(
    "names, low, high",
    [
        (("split",), 0.4, 0.6),
        # Everyday harmful requests use harmful words: what a bag of words makes of them is what a probe must beat.
        (("harmful", "harmless"), 0.5, 0.82),
        (("harmful", "borderline"), 0.5, 0.82),
    ],
    ids=["split", "everyday", "borderline"],
)
def test_what_a_bag_of_words_tells(names, low, high, options):
    auc = auc_across_groups(kinds(*names), options)
    print(f"bag of words, {' and '.join(names)}: AUC {auc:.3f}")
    assert low < auc < high


@pytest.mark.parametrize("names", [("harmful", "harmless"), ("harmful", "borderline"), ("split",)])
def test_length_does_not_tell_the_labels_apart(names):
    from sklearn.metrics import roc_auc_score

    rows = kinds(*names)
    for measure in (len, lambda text: len(text.split())):
        auc = roc_auc_score([row["label"] for row in rows], [measure(words(row)) for row in rows])
        assert 0.42 < auc < 0.58
