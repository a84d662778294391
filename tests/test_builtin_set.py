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


@pytest.mark.parametrize("name, least", [("builtin", 200), ("heldout", 40)])
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
    counts = Counter(row["category"] for row in read("builtin"))
    assert len(counts) == 12
    assert set(counts.values()) == {20}
    assert {row["category"] for row in read("heldout")} == set(counts)


@pytest.mark.parametrize("name", FILES)
def test_length_does_not_tell_the_sides_apart(name):
    from sklearn.metrics import roc_auc_score

    rows = read(name)
    for measure in (len, lambda request: len(request.split())):
        auc = roc_auc_score(labels(rows), [measure(request) for request in requests(rows)])
        assert 0.42 < auc < 0.58


@pytest.mark.parametrize(
    "options",
    [{}, {"ngram_range": (1, 2)}, {"analyzer": "char_wb", "ngram_range": (2, 5)}],
    ids=["words", "words and word pairs", "character n-grams"],
)
def test_wording_does_not_tell_the_sides_apart(options):
    from sklearn.feature_extraction.text import TfidfVectorizer

    if "analyzer" not in options:
        options = {**options, "token_pattern": r"[a-z']+"}
    assert auc_across_pairs(read("builtin"), TfidfVectorizer(**options)) < 0.65
