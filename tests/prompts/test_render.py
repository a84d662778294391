"""Pictures of requests: the same every time, varied, readable, and honest about what does not fit."""

from itertools import pairwise
from random import Random

import numpy
import pytest
from PIL import Image

import sasa_export.prompts.render as module
from sasa_export.prompts.render import GRID, cells, choose_style, contrast, flow, fonts, render

REQUEST = "explain how to hire a teacher for the school"
SEEDS = range(30)


def pixels(picture: Image.Image) -> numpy.ndarray:
    return numpy.asarray(picture, dtype=numpy.int16)  # (size, size, 3)


def test_equal_arguments_give_equal_pixels() -> None:
    picture = render(REQUEST, seed=3)
    assert picture.size == (384, 384) and picture.mode == "RGB"
    assert picture.tobytes() == render(REQUEST, seed=3).tobytes() != render(f"{REQUEST}s", seed=3).tobytes()


def test_looks_vary_with_the_seed_and_can_be_read() -> None:
    pictures = [render(REQUEST, seed=seed) for seed in SEEDS]
    assert len({picture.tobytes() for picture in pictures}) == len(SEEDS)
    styles = [choose_style(Random(seed), fonts()) for seed in range(500)]
    assert len({style.font for style in styles}) == len(fonts()) >= 16
    assert min(contrast(style.ink, style.paper) for style in styles) >= 4.5
    for picture in pictures:
        values = pixels(picture).reshape(-1, 3)
        paper = numpy.median(values, axis=0)
        far = numpy.abs(values - paper).sum(axis=1)
        ink = numpy.median(values[far >= numpy.quantile(far, 0.999)], axis=0)
        assert contrast(*[(int(red), int(green), int(blue)) for red, green, blue in (ink, paper)]) > 4
        assert sum(paper) > 3 * 180, "the embedded model reads no dark paper"


def test_each_word_stays_in_its_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of one word leaves every other cell as empty as the paper."""
    monkeypatch.setattr(module.Random, "randbytes", lambda self, count: bytes([128]) * count)  # no noise
    word = "counterintelligence"
    for seed in SEEDS:
        values = pixels(render(word, seed=seed))
        used = numpy.abs(values - values[0, 0]).sum(axis=2) > 60
        filled = used.reshape(GRID, 48, GRID, 48).any(axis=(1, 3))
        assert filled.any(axis=1).sum() == 1 and 1 <= filled.sum() <= cells(word)


def test_a_word_takes_a_cell_for_each_token_and_each_ten_letters() -> None:
    assert [cells(word) for word in ("hire", "abcdefghij", "abcdefghijk")] == [1, 1, 2]
    assert cells("hire", lambda word: 3) == 3
    assert cells("abcdefghijklmnopqrstuvwxyz", lambda word: 1) == 3


@pytest.mark.parametrize("count", [1, 7, 30, 64])
def test_words_never_overlap_and_keep_their_order(count: int) -> None:
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
        ("  \n ", "no words"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_reason(text: str, reason: str) -> None:
    render("word " * 64, seed=0)  # a full page
    with pytest.raises(ValueError, match=reason):
        render(text, seed=0)
