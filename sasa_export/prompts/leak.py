"""Nothing may leak from training into testing: records that share a picture or a question stay together.

Pictures are told apart by their bytes, not by their names; questions by their words, not by case, space and
punctuation.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np

from sasa_export.errors import DataError
from sasa_export.prompts.picture import digest
from sasa_export.prompts.record import Record


def asked(record: Record) -> str:
    """What a record asks: its question, or its prompt where that is the question."""
    return record.question or record.prompt


def normalised(text: str) -> str:
    """The words of a text: letters, marks and numbers in one case, one space between; the text where it has none."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    words = "".join(letter if unicodedata.category(letter)[0] in "LMN" else " " for letter in folded)
    return " ".join(words.split()) or " ".join(folded.split())


def grouped(records: Sequence[Record]) -> list[Record]:
    """The same records; `group` becomes the same for all that hang together by group, picture or question.

    A record may share its picture with a second and its question with a third: all three are one group then.
    """
    return [replace(record, group=f"group {label}") for record, label in zip(records, _connected(records), strict=True)]


def split(records: Sequence[Record], test_share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Part records into training and test sets that share no group, no picture and no question.

    Both keep the records' order, and both labels come as near to `test_share` as whole groups allow. Equal
    arguments give equal parts.

    Raises DataError where `test_share` is not between 0 and 1, or where all records hang together.
    """
    if not 0.0 < test_share < 1.0:
        raise DataError(f"the test share is {test_share:g}; it must lie between 0 and 1.")
    labels = _connected(records)  # (records,)
    count = int(labels.max()) + 1 if len(records) else 0
    if count < 2:
        raise DataError(_inseparable(records))
    sizes = np.zeros((count, 2))  # harmless and harmful records of each group
    np.add.at(sizes, (labels, np.array([record.label for record in records])), 1)
    chosen = _choose(sizes, test_share, Random(seed))
    train = [record for record, label in zip(records, labels, strict=True) if label not in chosen]
    return train, [record for record, label in zip(records, labels, strict=True) if label in chosen]


def check_disjoint(a: Sequence[Record], b: Sequence[Record]) -> None:
    """Raise DataError, which names the picture or the question, where a record of `b` shares one with `a`."""
    cache: dict[Path, str | None] = {}
    seen: dict[tuple[str, str], Record] = {}
    for record in a:
        for bond in _bonds(record, cache):
            seen.setdefault(bond, record)
    for record in b:
        for kind, value in _bonds(record, cache):
            other = seen.get((kind, value))
            if other is None:
                continue
            if kind == "question":
                what = f"the question {_shortened(asked(record))!r}"
            else:
                what = f"the picture {record.picture or 'drawn from its text'} (SHA-256 {value[:12]})"
            raise DataError(
                f"the sets leak: {what} is of {_called(other)} and of {_called(record)}. Records that share a picture "
                "or a question must stand on one side: part them with split, or give other data."
            )


def _choose(sizes: np.ndarray, share: float, random: Random) -> set[int]:
    """Groups whose records of either label come near to `share` of all: some, never all."""
    totals = sizes.sum(axis=0)
    wanted = share * totals  # (2,)
    order = list(range(len(sizes)))
    random.shuffle(order)
    order.sort(key=lambda group: -sizes[group].sum())  # large ones first, while small ones can still make up for them
    chosen: set[int] = set()
    have = np.zeros(2)
    changed = True
    while changed:  # every change comes nearer, so this ends
        changed = False
        for group in order:
            change = -sizes[group] if group in chosen else sizes[group]
            if _distance(have + change, wanted, totals) < _distance(have, wanted, totals):
                chosen ^= {group}
                have += change
                changed = True
    if not chosen:
        chosen = {order[-1]}
    elif len(chosen) == len(sizes):
        chosen.remove(order[-1])
    return chosen


def _distance(have: np.ndarray, wanted: np.ndarray, totals: np.ndarray) -> float:
    return float((((have - wanted) ** 2) / np.maximum(totals, 1)).sum())


def _connected(records: Sequence[Record]) -> np.ndarray:
    """The number of the connected component of each record: (records,)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    cache: dict[Path, str | None] = {}
    columns: dict[tuple[str, str], int] = {}
    rows, cols = [], []
    for row, record in enumerate(records):
        for bond in [("group", f"{record.source}/{record.group}"), *_bonds(record, cache)]:
            rows.append(row)
            cols.append(len(records) + columns.setdefault(bond, len(columns)))
    size = len(records) + len(columns)
    edges = coo_array((np.ones(len(rows), bool), (rows, cols)), shape=(size, size))
    return connected_components(edges, directed=False)[1][: len(records)] if size else np.zeros(0, int)


def _bonds(record: Record, cache: dict[Path, str | None]) -> Iterator[tuple[str, str]]:
    question = normalised(asked(record))
    if question:
        yield "question", question
    if record.picture is not None:
        if record.picture not in cache:
            cache[record.picture] = digest(record)
        value = cache[record.picture]
    else:
        value = digest(record)
    if value is not None:
        yield "picture", value


def _inseparable(records: Sequence[Record]) -> str:
    if len(records) < 2:
        return f"{len(records)} records cannot be parted into a training and a test set. Give more."
    texts: dict[str, int] = {}
    for record in records:
        texts[asked(record)] = texts.get(asked(record), 0) + 1
    text, often = max(texts.items(), key=lambda item: item[1])
    return (
        f"all {len(records)} records hang together by their groups, pictures and questions, so they cannot be parted "
        f'("{_shortened(text)}" is asked {often} times). Where a text only accompanies the picture, give what is asked '
        'as "question".'
    )


def _called(record: Record) -> str:
    return f"{record.source} {record.name}".strip()


def _shortened(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."
