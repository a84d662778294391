"""Pictures of requests: the same on every machine, varied, readable, and honest about what does not fit."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import numpy
import pytest
from PIL import Image

from sasa_export.probe import render as module
from sasa_export.prompts.render import GRID, cells, contrast, flow, fonts, render

REQUEST = "explain how to hire a teacher for the school"


def pixels(picture: Image.Image) -> numpy.ndarray:
    return numpy.asarray(picture.convert("RGB"), dtype=numpy.int16)  # (size, size, 3)


def colour(values: numpy.ndarray) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in values)
    return red, green, blue


def test_equal_arguments_give_equal_pixels():
    for seed in range(6):
        assert render(REQUEST, seed=seed).tobytes() == render(REQUEST, seed=seed).tobytes()


@pytest.mark.parametrize("size", [224, 384, 672])
def test_the_picture_has_the_size_asked_for(size):
    picture = render(REQUEST, seed=3, size=size)
    assert picture.size == (size, size)
    assert picture.mode == "RGB"


def test_looks_vary_with_the_seed():
    pictures = [render(REQUEST, seed=seed) for seed in range(40)]
    assert len({picture.tobytes() for picture in pictures}) == 40
    papers = {tuple(numpy.median(pixels(picture).reshape(-1, 3), axis=0)) for picture in pictures}
    assert len(papers) > 20
    assert all(sum(paper) > 3 * 180 for paper in papers), "the embedded model reads no dark paper"


def test_the_words_decide_what_is_drawn():
    assert render("hire a teacher", seed=1).tobytes() != render("hire a teachers", seed=1).tobytes()


def test_fonts_come_from_matplotlib_and_hold_letters():
    assert len(fonts()) >= 16
    assert all(font.exists() and "matplotlib" in str(font) for font in fonts())


@pytest.mark.parametrize("seed", range(30))
def test_ink_stands_out_from_paper(seed):
    values = pixels(render(REQUEST, seed=seed)).reshape(-1, 3)
    paper = numpy.median(values, axis=0)
    far = numpy.abs(values - paper).sum(axis=1)
    ink = numpy.median(values[far >= numpy.quantile(far, 0.999)], axis=0)
    assert contrast(colour(ink), colour(paper)) > 4


@pytest.mark.parametrize("seed", range(30))
def test_each_word_stays_in_its_cells(seed, monkeypatch):
    """A page of one word leaves every other cell as empty as the paper."""
    monkeypatch.setattr(module.Random, "randbytes", lambda self, count: bytes([128]) * count)  # no noise
    word = "counterintelligence"
    values = pixels(render(word, seed=seed))
    used = numpy.abs(values - values[0, 0]).sum(axis=2) > 60
    filled = used.reshape(GRID, 48, GRID, 48).any(axis=(1, 3))
    assert filled.any(axis=1).sum() == 1
    assert 1 <= filled.sum() <= cells(word)


def test_a_word_takes_a_cell_for_each_token_and_each_ten_letters():
    assert cells("hire") == 1
    assert cells("abcdefghij") == 1
    assert cells("abcdefghijk") == 2
    assert cells("hire", lambda word: 3) == 3
    assert cells("abcdefghijklmnopqrstuvwxyz", lambda word: 1) == 3


@pytest.mark.parametrize("count", [1, 7, 30, 64])
def test_words_never_overlap_and_keep_their_order(count):
    for seed in range(50):
        rng = Random(seed)
        widths = [1] * count if count == 64 else [rng.choice((1, 1, 1, 2)) for _ in range(count)]
        places = flow(widths, rng)
        spans = [(row * GRID + column, width) for (row, column), width in zip(places, widths, strict=True)]
        assert all(start % GRID + width <= GRID for start, width in spans)
        assert all(a + width <= b for (a, width), (b, _) in pairwise(spans))
        assert spans[-1][0] + spans[-1][1] <= GRID * GRID


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("word " * 65, "65 words take 9 lines of 8 cells"),
        ("a" * 81, "a word takes 9 cells and a line has 8"),
        ("", "no words"),
        ("  \n ", "no words"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_reason(text, reason):
    with pytest.raises(ValueError, match=reason):
        render(text, seed=0)


def test_a_full_page_fits():
    render("word " * 64, seed=0)
