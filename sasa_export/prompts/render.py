"""Draw a one-line request as a picture: the way a harmful request reaches a model past its text.

Words flow over a grid of 8 x 8 cells, because the embedded model (`smol-llava`) reads one token a cell.
Fonts, sizes, colours and layouts vary with the seed, so that a probe learns the request and not its looks.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import matplotlib
import numpy
from PIL import Image, ImageDraw, ImageFont

GRID = 8  # cells a side
DESIGN = 384  # pixels a side that the lengths below are given for
CELL = DESIGN // GRID
MARGIN = 2.0  # pixels kept free left and right of a word
STRAY = 4.0  # pixels, to the right, up and down; the embedded model reads words at the left of their cells
LETTERS_PER_CELL = 10
CONTRAST = 5.0  # least ratio of luminances between ink and paper; WCAG asks for 4.5

Colour = tuple[int, int, int]
Place = tuple[int, int]  # row and column of a word's first cell


@dataclass(frozen=True)
class Style:
    """How a picture looks; lengths in pixels of a picture 384 wide."""

    font: Path
    letter_size: float
    ink: Colour
    paper: Colour
    jitter: float  # 0 for words in line, 1 for words that stray by up to STRAY
    noise: int  # largest change of a colour value, of 255


def render(text: str, *, seed: int, pieces: Callable[[str], int] | None = None, items: int = 0) -> Image.Image:
    """Draw `text` into an RGB picture of 384 x 384 pixels; equal arguments give equal pixels.

    `pieces(word)` is the number of tokens that a tokenizer makes of a word: a word takes as many cells, and
    at least one for every ten letters begun. `items` empty points of a numbered list stand below the text, as in
    FigStep (Gong et al., AAAI 2025). Raises ValueError when the words do not fit the 64 cells, or when there are none.
    """
    rng = Random(seed)
    words = [*text.split(), *(f"{number}." for number in range(1, items + 1))]
    widths = [cells(word, pieces) for word in words]
    places = flow(widths, rng, items)
    return draw(words, widths, places, choose_style(rng, fonts()), rng)


def fits(text: str, items: int = 0) -> bool:
    """Whether `render` has room for it."""
    try:
        flow([*map(cells, text.split()), *[1] * items], Random(0), items)
    except ValueError:
        return False
    return True


def cells(word: str, pieces: Callable[[str], int] | None = None) -> int:
    """How many cells a word takes."""
    by_letters = math.ceil(len(word) / LETTERS_PER_CELL)
    return max(by_letters, pieces(word) if pieces else 1)


def flow(widths: Sequence[int], rng: Random, items: int = 0) -> list[Place]:
    """Where each word starts: lines of varying length, broken between words, somewhere on the grid.

    The last `items` words have a line of their own each. Raises ValueError when the words do not fit.
    """
    if len(widths) <= items:
        raise ValueError("there is nothing to draw: the text has no words")
    if max(widths) > GRID:
        raise ValueError(f"a word takes {max(widths)} cells and a line has {GRID}: shorten the word")
    full = _wrap(widths, GRID, items)
    if len(full) > GRID:
        raise ValueError(
            f"{len(widths)} words take {len(full)} lines of {GRID} cells and a picture has {GRID}: shorten the text"
        )
    measure = rng.randint(max(widths), GRID)
    lines = _wrap(widths, measure, items)
    if len(lines) > GRID:
        measure, lines = GRID, full
    spaced = 2 * len(lines) - 1 <= GRID and rng.random() < 0.3
    step = 2 if spaced else 1
    top = rng.randint(0, GRID - step * (len(lines) - 1) - 1)
    left = rng.randint(0, GRID - measure)
    kind = rng.choice(("left", "left", "left", "centred", "ragged")) if not items else "left"
    places = []
    for number, line in enumerate(lines):
        slack = measure - sum(line)
        column = left + {"left": 0, "centred": slack // 2, "ragged": rng.randint(0, slack)}[kind]
        for width in line:
            places.append((top + step * number, column))
            column += width
    return places


def _wrap(widths: Sequence[int], measure: int, items: int) -> list[list[int]]:
    """Break words of so many cells into lines of at most `measure` cells, each as full as can be."""
    lines: list[list[int]] = [[]]
    for number, width in enumerate(widths):
        if sum(lines[-1]) + width > measure or number >= len(widths) - items:
            lines.append([])
        lines[-1].append(width)
    return lines


@functools.cache
def fonts() -> tuple[Path, ...]:
    """The text fonts that matplotlib carries: the same on every machine."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    found = [*folder.glob("DejaVuS*.ttf"), *folder.glob("STIXGeneral*.ttf")]
    return tuple(sorted(font for font in found if "Display" not in font.name))  # Display holds no letters


def choose_style(rng: Random, choice: Sequence[Path], variety: float = 1.0) -> Style:
    """A random look in one of the fonts of `choice`; `variety` 0 is black on white, in line, clean."""
    coloured = rng.random() < 0.75 * variety
    ink, paper = _colours(rng) if coloured else ((0, 0, 0), (255, 255, 255))
    return Style(
        font=rng.choice(choice),
        letter_size=rng.uniform(15 - 3 * variety, 15 + 3.5 * variety),
        ink=ink,
        paper=paper,
        jitter=variety * rng.choice((0.0, 0.4, 0.8)),
        noise=rng.randint(2, 14) if rng.random() < 0.4 * variety else 0,
    )


def _colours(rng: Random) -> tuple[Colour, Colour]:
    """A dark ink and a light paper, far enough apart to read."""
    while True:
        ink: Colour = (rng.randint(0, 110), rng.randint(0, 110), rng.randint(0, 110))
        paper: Colour = (rng.randint(190, 255), rng.randint(190, 255), rng.randint(190, 255))
        if contrast(ink, paper) >= CONTRAST:
            return ink, paper


def contrast(one: Colour, other: Colour) -> float:
    """The ratio of the luminances of two colours as WCAG defines it, 1 to 21."""
    darker, lighter = sorted((_luminance(one), _luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: Colour) -> float:
    linear = [(v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4) for v in (c / 255 for c in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def draw(
    words: Sequence[str],
    widths: Sequence[int],
    places: Sequence[Place],
    style: Style,
    rng: Random,
    size: int = DESIGN,
) -> Image.Image:
    """Draw each word into its cells, in smaller letters where it is too long for them."""
    scale = size / DESIGN
    picture = Image.new("RGB", (size, size), style.paper)
    canvas = ImageDraw.Draw(picture)
    for word, width, (row, column) in zip(words, widths, places, strict=True):
        room = scale * (width * CELL - 2 * MARGIN)  # pixels, as all lengths from here
        font, length = _fitting(style.font, scale * style.letter_size, word, room)
        right = min(scale * STRAY * style.jitter * rng.random(), room - length)
        down = scale * STRAY * style.jitter * rng.uniform(-1, 1)
        x = scale * (column * CELL + MARGIN) + right
        baseline = scale * ((row + 0.5) * CELL - 1 + 0.35 * style.letter_size) + down
        canvas.text((x, baseline), word, style.ink, font, anchor="ls")
    return _with_noise(picture, style.noise, rng) if style.noise else picture


def _fitting(path: Path, letter_size: float, word: str, room: float) -> tuple[ImageFont.FreeTypeFont, float]:
    """The font at `letter_size` pixels, or smaller so that `word` keeps to `room`, and its length then."""
    halves = math.ceil(2 * letter_size)  # in half pixels, so that few fonts are kept
    while True:
        font = _font(path, halves / 2)
        length = font.getlength(word)
        if length <= room or halves <= 2:
            return font, length
        # Letters do not shrink evenly with the size, since they are fitted to whole pixels.
        halves = min(halves - 1, math.ceil(halves * room / length))


@functools.lru_cache(maxsize=4096)
def _font(path: Path, letter_size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, letter_size, layout_engine=ImageFont.Layout.BASIC)


def _with_noise(picture: Image.Image, amount: int, rng: Random) -> Image.Image:
    """Change each colour value by at most `amount`, evenly spread."""
    values = numpy.asarray(picture, dtype=numpy.int16)  # (size, size, 3)
    raw = numpy.frombuffer(rng.randbytes(values.size), dtype=numpy.uint8).reshape(values.shape)
    change = raw.astype(numpy.int16) * (2 * amount + 1) // 256 - amount
    return Image.fromarray(numpy.clip(values + change, 0, 255).astype(numpy.uint8))
