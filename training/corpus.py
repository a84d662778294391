"""What the tower learns from: words, fonts and pages of words whose cells are known."""

from __future__ import annotations

import functools
import json
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy
from PIL import Image, ImageEnhance, ImageOps

from sasa_export.models.smol_llava import FILES
from sasa_export.prompts import render

FONT_FOLDERS = (Path("/usr/share/fonts"), Path.home() / ".local/share/fonts")
FONTS_PER_FAMILY = 6
HELD_OUT_FAMILIES = ("Carlito", "Lato", "Cantarell", "LinLibertine", "Roboto", "C059", "Nimbus", "Vollkorn")
UNREADABLE = ("D050000L", "Sketch", "Math", "math", "Symbol", "Emoji", "Keyboard", "LinLibertine_I")
MARKS = (".", ",", "?", "!", ":")
LISTS = 0.08  # the share of pages that end in an empty numbered list
PHOTOGRAPHS = 0.2  # the share of pages that are a photograph, in which there is nothing to read
IGNORED, BLANK = -100, -1  # targets of a cell other than a token

PICTURES = json.loads((FILES / "processor_config.json").read_text(encoding="utf-8"))["image_processor"]
IMAGE_SIZE = PICTURES["size"]["height"]  # pixels
IMAGE_MEAN, IMAGE_STD = PICTURES["image_mean"][0], PICTURES["image_std"][0]  # pictures of text are mostly paper

Array = numpy.ndarray[Any, Any]


@dataclass(frozen=True)
class Words:
    """A closed vocabulary: words as written, and how often each is drawn (cumulative)."""

    words: tuple[str, ...]
    cumulative: tuple[float, ...]

    def draw(self, rng: Random, count: int) -> list[str]:
        return rng.choices(self.words, cum_weights=self.cumulative, k=count)


def request_words(files: Iterable[Path]) -> Counter[str]:
    """The words of the requests in files of {"harmful", "harmless"} or {"text"} lines, without marks, counted."""
    texts: list[str] = []
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            texts += [record[key] for key in ("harmful", "harmless", "text", "picture") if key in record]
    words = [word.strip("".join(MARKS) + "\"'()") for text in texts for word in text.split()]
    return Counter(word for word in words if word)


def vocabulary(common: int, requests: Counter[str], held_out: Iterable[str] = ()) -> Words:
    """The `common` commonest English words, drawn with p ~ (rank + 30)^-0.4, and the words of requests.

    Those are drawn with p ~ 0.02 n^0.7 where that is more, n being how often they occur: requests are told apart by
    rarer words.
    """
    from wordfreq import top_n_list

    left_out = set(held_out)
    ranked = [word for word in top_n_list("en", common) if word.isascii() and word not in left_out]
    weights = {word: (rank + 30) ** -0.4 for rank, word in enumerate(ranked)}
    for word, count in requests.items():
        weights[word] = max(weights.get(word, 0.0), 0.02 * count**0.7)
    total, cumulative = 0.0, []
    for weight in weights.values():
        total += weight
        cumulative.append(total)
    return Words(tuple(weights), tuple(cumulative))


def held_out_words(common: int, requests: Iterable[str], count: int = 100) -> list[str]:
    """Less common words that no request holds, kept out of training to measure how they are read."""
    from wordfreq import top_n_list

    used = {word.lower() for word in requests}
    rest = [word for word in top_n_list("en", common)[1000:] if word.isascii() and word.isalpha()]
    return Random(0).sample([word for word in rest if len(word) > 3 and word not in used], count)


@functools.cache
def debian_fonts() -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Fonts of this machine that hold Latin letters: those to train on, and those of families held out."""
    train: dict[str, list[Path]] = {}
    held_out: list[Path] = []
    files = sorted(f for folder in FONT_FOLDERS for kind in ("*.ttf", "*.otf") for f in folder.rglob(kind))
    for file in files:
        if any(part in file.name for part in (*UNREADABLE, "DejaVu")) or not _latin(file):
            continue
        family = file.stem.split("-")[0].split("_")[0]
        if family.startswith(HELD_OUT_FAMILIES):
            held_out.append(file)
        else:
            train.setdefault(family, []).append(file)
    rng = Random(0)
    chosen = [f for group in train.values() for f in rng.sample(group, min(len(group), FONTS_PER_FAMILY))]
    return tuple(chosen), tuple(rng.sample(held_out, min(len(held_out), 24)))


def _latin(file: Path) -> bool:
    from fontTools.ttLib import TTFont, TTLibError

    try:
        with TTFont(file, lazy=True) as font:
            known = font.getBestCmap() or {}
    except (TTLibError, OSError):
        return False
    return all(ord(letter) in known for letter in string.ascii_letters + string.digits + ".,?!:'-")


def normalised(picture: Image.Image) -> Array:
    """Pixels as the processor of smol-llava gives them: (3, 384, 384), float32."""
    if picture.size != (IMAGE_SIZE, IMAGE_SIZE):
        picture = picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    values = numpy.asarray(picture, dtype=numpy.float32) / 255.0
    return ((values - IMAGE_MEAN) / IMAGE_STD).transpose(2, 0, 1).astype(numpy.float32)


def capitalised(word: str) -> str:
    """A word as it begins a sentence."""
    return word[:1].upper() + word[1:]


class Tokens:
    """Token ids of words inside a sentence, remembered."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, tuple[int, ...]] = {}

    def __call__(self, word: str) -> tuple[int, ...]:
        if word not in self._known:
            self._known[word] = tuple(self._tokenizer.encode(f" {word}", add_special_tokens=False))
        return self._known[word]

    def count(self, word: str) -> int:
        return len(self(word))


def targets(words: Sequence[str], widths: Sequence[int], places: Sequence[render.Place], tokens: Tokens) -> Array:
    """What each of the 64 cells should be read as: a token id, or BLANK; (64,), int64."""
    grid = numpy.full((render.GRID, render.GRID), BLANK, dtype=numpy.int64)
    for word, width, (row, column) in zip(words, widths, places, strict=True):
        ids = tokens(word)[:width]
        grid[row, column : column + len(ids)] = ids
    return grid.reshape(-1)


def photographs_in(folder: Path) -> tuple[Image.Image, ...]:
    """The pictures below a folder, in RGB, the shorter side at most twice that of a page."""
    found = []
    for file in sorted(file for kind in ("*.jpg", "*.png", "*.webp") for file in folder.rglob(kind)):
        with Image.open(file) as picture:
            picture.thumbnail((4 * IMAGE_SIZE, 2 * IMAGE_SIZE))
            found.append(picture.convert("RGB"))
    return tuple(found)


def part_of(photograph: Image.Image, rng: Random) -> Image.Image:
    """A part of a photograph as large as a page, now and then mirrored, paler, darker or grey."""
    side = rng.uniform(0.3, 1.0) * min(photograph.size)
    width = min(photograph.width, side * rng.uniform(1.0, 1.5))  # the processor of smol-llava squeezes pictures
    left, top = rng.uniform(0, photograph.width - width), rng.uniform(0, photograph.height - side)
    box = (left, top, left + width, top + side)
    part = photograph.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC, box=box)
    if rng.random() < 0.5:
        part = ImageOps.mirror(part)
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        part = change(part).enhance(rng.uniform(0.5, 1.5))
    return ImageOps.grayscale(part).convert("RGB") if rng.random() < 0.15 else part


@dataclass(frozen=True)
class Pages:
    """An endless book of random pages, each made from its number alone."""

    words: Words
    tokens: Tokens
    fonts: tuple[Path, ...]
    seed: int
    photographs: tuple[Image.Image, ...] = ()

    def page(self, number: int, variety: float = 1.0) -> tuple[Array, Array]:
        """Pixels (3, 384, 384) and targets (64,) of a page; `variety` as in `render.choose_style`."""
        rng = Random(f"{self.seed}/{number}")
        if self.photographs and rng.random() < PHOTOGRAPHS:
            return normalised(part_of(rng.choice(self.photographs), rng)), numpy.full(render.GRID**2, BLANK)
        words = self._sentence(rng, rng.randint(4, 16) if rng.random() < 0.25 else rng.randint(20, 56))
        items = 3 if rng.random() < LISTS else 0
        words += [f"{point}." for point in range(1, items + 1)]
        widths = [render.cells(word, self.tokens.count) for word in words]
        while True:
            try:
                places = render.flow(widths, rng, items)
                break
            except ValueError:
                drop = max(range(len(words) - items), key=widths.__getitem__)
                del words[drop], widths[drop]
        known = max(4, round(len(self.fonts) * min(1.0, 0.05 + variety)))
        carried = render.fonts()[: max(2, round(16 * min(1.0, 0.1 + variety)))]
        choice = carried if rng.random() < 0.5 else self.fonts[:known] or carried
        style = render.choose_style(rng, choice, variety)
        size = rng.randint(320, 640) if rng.random() < 0.12 * variety else IMAGE_SIZE
        picture = render.draw(words, widths, places, style, rng, size)
        return normalised(picture), targets(words, widths, places, self.tokens)

    def _sentence(self, rng: Random, count: int) -> list[str]:
        """Random words with the capitals and marks of a request, and now and then elsewhere."""
        words = self.words.draw(rng, count)
        for index, word in enumerate(words):
            if rng.random() < (0.5 if index == 0 else 0.05):
                word = capitalised(word)
            if rng.random() < (0.4 if index == len(words) - 1 else 0.04) and word[-1].isalnum():
                word += rng.choice(MARKS)
            words[index] = word
        return words
