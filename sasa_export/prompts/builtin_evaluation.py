"""The built-in evaluation set, which shares no request with the built-in calibration set.

evaluation.jsonl has one request a line, of four kinds: `harmful`, its `harmless` twin (one group), `borderline`
(harmless, but sounds harmful) and `split`. A split group is two texts and two pictures in all four combinations, two
of them harmful: each text and each picture is harmful once and harmless once, so neither tells anything alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sasa_export.prompts.prompt import CARRIERS
from sasa_export.prompts.record import Record

SOURCE = "builtin-evaluation"
ATTACKS = {"harmful": "everyday", "harmless": "everyday", "borderline": "borderline", "split": "split"}


def builtin_evaluation(pieces: Callable[[str], int] | None) -> list[Record]:
    """All records: each request as plain text and as a picture, a split one as its text beside its picture.

    `attack` is "everyday" (harmful and harmless twins), "borderline" or "split". `pieces`: see `render`.
    """
    path = Path(__file__).with_name("evaluation.jsonl")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [record for line in lines for record in (_split if line["kind"] == "split" else _both)(line, pieces)]


def _both(line: dict[str, Any], pieces: Callable[[str], int] | None) -> Iterator[Record]:
    """Both channels. Twins share their picture's look and what accompanies it, so that neither tells them apart."""
    seed, request = _seed(line["group"]), line["request"]
    yield Record(f"{line['id']}/text", request, channel="text", **_common(line))
    yield Record(
        f"{line['id']}/picture",
        CARRIERS[seed % len(CARRIERS)],
        channel="picture",
        image=partial(drawn, request, seed, pieces),
        question=request,
        **_common(line),
    )


def _split(line: dict[str, Any], pieces: Callable[[str], int] | None) -> Iterator[Record]:
    """One picture, drawn alike beside either text."""
    seed = _seed(f"{line['group']}/{line['picture']}")
    yield Record(
        line["id"],
        line["text"],
        channel="picture",
        image=partial(drawn, line["picture"], seed, pieces),
        question=f"{line['text']}: {line['picture']}",
        **_common(line),
    )


def _common(line: dict[str, Any]) -> dict[str, Any]:
    shared = {key: line[key] for key in ("label", "group", "category")}
    return {**shared, "attack": ATTACKS[line["kind"]], "source": SOURCE}


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def drawn(words: str, seed: int, pieces: Callable[[str], int] | None) -> Any:
    """The picture of `words` (`render`)."""
    from sasa_export.prompts.render import render

    try:
        return render(words, seed=seed, pieces=pieces)
    except ValueError:  # a tokenizer of short pieces asks for more cells than there are
        return render(words, seed=seed)
