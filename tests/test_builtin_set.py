"""The built-in calibration pairs and the held-out pairs keep the rules a program can check."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

CALIBRATE = Path(__file__).resolve().parent.parent / "sasa_export" / "calibrate"
FILES = {"builtin": CALIBRATE / "builtin.jsonl", "heldout": CALIBRATE / "heldout.jsonl"}
SIDES = ("harmful", "harmless")
OPENINGS = ("how do i ", "tell me how ", "explain ", "give me ", "write ")


def read(name):
    return [json.loads(line) for line in FILES[name].read_text(encoding="utf-8").splitlines()]


def part(name):
    """The builtin pairs of one kind: the borderline ones, the everyday ones, or both."""
    kinds = {"borderline": (False,), "everyday": (True,), "whole": (False, True)}[name]
    return [row for row in read("builtin") if ("-everyday-" in row["pair"]) in kinds]


def requests(rows):
    return [row[side] for row in rows for side in SIDES]


def labels(rows):
    return np.tile([1, 0], len(rows))


def auc_across_pairs(rows, vectorizer):
    """ROC-AUC of a bag-of-words classifier on pairs it was not fitted on."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(vectorizer, LogisticRegression(class_weight="balanced", max_iter=1000))
    scores = cross_val_predict(
        model,
        requests(rows),
        labels(rows),
        groups=np.repeat(np.arange(len(rows)), 2),
        cv=GroupKFold(5),
        method="decision_function",
    )
    return roc_auc_score(labels(rows), scores)


@pytest.mark.parametrize("name, least", [("builtin", 380), ("heldout", 60)])
def test_every_line_is_a_whole_pair(name, least):
    rows = read(name)
    assert len(rows) >= least
    for row in rows:
        assert list(row) == ["pair", "category", "harmful", "harmless"]
        assert row["pair"].startswith(row["category"] + "-")


@pytest.mark.parametrize("name", FILES)
def test_requests_are_short_plain_lines(name):
    for request in requests(read(name)):
        assert re.fullmatch(r"[a-z']+(,? [a-z']+)*", request), request
        assert 4 <= len(request.split()) <= 14, request
        assert request.startswith(OPENINGS), request


@pytest.mark.parametrize("name", FILES)
def test_both_members_of_a_pair_open_alike(name):
    for row in read(name):
        opening = [next(start for start in OPENINGS if row[side].startswith(start)) for side in SIDES]
        assert opening[0] == opening[1], row["pair"]


def test_no_request_and_no_pair_name_occurs_twice():
    rows = read("builtin") + read("heldout")
    for values in (requests(rows), [row["pair"] for row in rows]):
        assert [value for value, count in Counter(values).items() if count > 1] == []


def test_no_heldout_request_is_a_reworded_builtin_request():
    known = [set(request.split()) for request in requests(read("builtin"))]
    for request in requests(read("heldout")):
        words = set(request.split())
        nearest = max(len(words & other) / len(words | other) for other in known)
        assert nearest < 0.65, request


def test_categories():
    borderline = Counter(row["category"] for row in part("borderline"))
    assert len(borderline) == 12
    assert set(borderline.values()) == {20}
    everyday = Counter(row["category"] for row in part("everyday"))
    assert set(everyday) == set(borderline)
    assert set(everyday.values()) == {11, 12}
    assert {row["category"] for row in read("heldout")} == set(borderline)
    assert {row["category"] for row in read("heldout") if "-everyday-" in row["pair"]} == set(borderline)


@pytest.mark.parametrize(
    "rows",
    [part("whole"), part("borderline"), part("everyday"), read("heldout")],
    ids=["builtin", "builtin borderline", "builtin everyday", "heldout"],
)
def test_length_does_not_tell_the_sides_apart(rows):
    from sklearn.metrics import roc_auc_score

    for measure in (len, lambda request: len(request.split())):
        auc = roc_auc_score(labels(rows), [measure(request) for request in requests(rows)])
        assert 0.42 < auc < 0.58


WORDS = {"token_pattern": r"[a-z']+"}
PAIRS = {**WORDS, "ngram_range": (1, 2)}
CHARACTERS = {"analyzer": "char_wb", "ngram_range": (2, 5)}


@pytest.mark.parametrize(
    "name, options, limit",
    [
        ("whole", WORDS, 0.65),
        ("whole", PAIRS, 0.67),
        ("whole", CHARACTERS, 0.65),
        # Everyday harmful requests use everyday harmful words; the borderline pairs must not lean on them.
        ("borderline", WORDS, 0.6),
        ("borderline", PAIRS, 0.6),
        ("borderline", CHARACTERS, 0.6),
        ("everyday", WORDS, 0.7),
        ("everyday", PAIRS, 0.7),
        ("everyday", CHARACTERS, 0.7),
    ],
)
def test_wording_hardly_tells_the_sides_apart(name, options, limit):
    from sklearn.feature_extraction.text import TfidfVectorizer

    assert auc_across_pairs(part(name), TfidfVectorizer(**options)) < limit
