"""The records of the built-in evaluation set: both channels of each request, and pictures that can be read."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

import sasa_export
from sasa_export.models import open_source, smol_llava
from sasa_export.prompts import asked, grouped
from sasa_export.prompts.builtin_evaluation import builtin_evaluation, drawn
from sasa_export.prompts.prompt import CARRIERS
from sasa_export.prompts.render import GRID, cells, flow, render

FILE = Path(sasa_export.__file__).parent / "datasets" / "evaluation.jsonl"
ROWS: list[dict[str, Any]] = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]


def test_records_carry_each_request_in_both_channels():
    records = builtin_evaluation(None)
    assert Counter((record.attack, record.channel, record.label) for record in records) == {
        **{("everyday", channel, label): 150 for channel in ("text", "picture") for label in (0, 1)},
        **{("borderline", channel, 0): 120 for channel in ("text", "picture")},
        **{("split", "picture", label): 60 for label in (0, 1)},
    }
    by_request = defaultdict(list)
    for record in records:
        by_request[asked(record)].append(record)
        assert record.source == "builtin-evaluation"
    for row in ROWS:
        if row["kind"] == "split":
            found = by_request[f"{row['text']}: {row['picture']}"]
            assert [(record.prompt, record.name) for record in found] == [(row["text"], row["id"])]
        else:
            found = by_request[row["request"]]
            text, picture = found
            assert (text.prompt, text.image, text.name) == (row["request"], None, f"{row['id']}/text")
            assert picture.prompt in CARRIERS and picture.name == f"{row['id']}/picture"
        for record in found:
            assert (record.label, record.category, record.group) == (row["label"], row["category"], row["group"])
            assert record.image is None or words_of(record.image) == row.get("picture", row.get("request"))


def words_of(image: Any) -> str:
    return str(image.args[0])


def test_groups_are_whole():
    """Nothing further hangs together: a group is a pair of twins, one borderline request, or a split group."""
    records = builtin_evaluation(None)
    assert len({record.group for record in records}) == len({record.group for record in grouped(records)}) == 300


def test_twins_share_what_accompanies_their_pictures():
    carriers = defaultdict(set)
    for record in builtin_evaluation(None):
        if record.attack == "everyday" and record.channel == "picture":
            carriers[record.group].add(record.prompt)
    assert all(len(found) == 1 for found in carriers.values())
    assert {prompt for found in carriers.values() for prompt in found} == set(CARRIERS)


def test_the_pixels_of_a_split_picture_tell_nothing():
    pixels = defaultdict(list)
    for record in builtin_evaluation(None):
        if record.attack == "split":
            assert record.image is not None
            pixels[hashlib.sha256(record.image().tobytes()).digest()].append(record.label)
    assert len(pixels) == 60 and all(sorted(labels) == [0, 1] for labels in pixels.values())


def test_a_picture_is_drawn_alike_every_time():
    once, again = (next(r for r in builtin_evaluation(None) if r.image is not None) for _ in range(2))
    assert once.image is not None and again.image is not None and once.name == again.name
    assert once.image().tobytes() == again.image().tobytes()


@pytest.mark.parametrize("pieces", [None, lambda word: 9], ids=["fitting", "too many pieces for a line"])
def test_a_tokenizer_of_too_short_pieces_is_left_aside(pieces):
    assert drawn("hire a teacher", 3, pieces).tobytes() == render("hire a teacher", seed=3).tobytes()


@pytest.mark.parametrize("pieces", [None, lambda word: (len(word) + 1) // 2, len], ids=["words", "pairs", "letters"])
def test_every_picture_holds_its_words(pieces):
    for record in builtin_evaluation(pieces):
        if record.image is not None:
            record.image()


@pytest.mark.smol
@pytest.mark.xdist_group("smol")
def test_smol_llava_reads_the_pictures():
    """The image token of a word's cell is nearest to the word's own embedding, in a sample of the pictures."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    directory = open_source("smol-llava").directory
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(directory)
    pieces = smol_llava.pieces(processor.tokenizer)
    pictures = [record.image for record in builtin_evaluation(pieces) if isinstance(record.image, partial)]
    # Every request fits the grid with as many cells as its words have tokens.
    places = [flow([cells(word, pieces) for word in words_of(p).split()], Random(p.args[1])) for p in pictures]
    pictures, places = pictures[::8], places[::8]
    pixels = processor.image_processor([picture() for picture in pictures], return_tensors="pt")["pixel_values"]
    table = model.get_input_embeddings().weight.detach()[: smol_llava.IMAGE_TOKEN_ID]  # (tokens, hidden)
    table = torch.nn.functional.normalize(table, dim=-1)
    with torch.inference_mode():
        features = model.get_image_features(pixel_values=pixels).pooler_output  # of each picture (64, hidden)
        read = [(seen @ table.T).argmax(-1).tolist() for seen in features]
    hits = []
    for ids, picture, starts in zip(read, pictures, places, strict=True):
        for word, (row, column) in zip(words_of(picture).split(), starts, strict=True):
            wanted = processor.tokenizer.encode(f" {word}", add_special_tokens=False)
            first = row * GRID + column
            hits.append(ids[first : first + len(wanted)] == wanted)
    share = sum(hits) / len(hits)
    print(f"{len(hits)} words in {len(pictures)} pictures, {share:.1%} of them read")
    assert share > 0.9
