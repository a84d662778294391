"""Draw a one-line request as a picture, the form of typographic attacks.

Words flow over a grid of 8 x 8 cells, because the embedded model (`smol-llava`) reads one token per cell.
Fonts, sizes, colours and layouts vary with the seed, so that a probe learns the request and not its style.
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

GRID = 8  # cells per side
DESIGN = 384  # pixels per side; the lengths below refer to this size
CELL = DESIGN // GRID
MARGIN = 2.0  # free pixels left and right of a word
STRAY = 4.0  # pixels, to the right, up and down; the embedded model reads words at the left of their cells
LETTERS_PER_CELL = 10
CONTRAST = 5.0  # minimum contrast ratio of ink and paper; WCAG requires 4.5

Colour = tuple[int, int, int]
Place = tuple[int, int]  # row and column of a word's first cell


@dataclass(frozen=True)
class Style:
    """The look of a picture. Lengths are in pixels of a picture 384 wide."""

    font: Path
    letter_size: float
    ink: Colour
    paper: Colour
    jitter: float  # 0 for aligned words, 1 for shifts of up to STRAY
    noise: int  # largest change of a colour value (0 to 255)


def render(text: str, *, seed: int, pieces: Callable[[str], int] | None = None, items: int = 0) -> Image.Image:
    """Return an RGB picture of `text`, 384 x 384 pixels. Equal arguments give equal pixels.

    `pieces(word)` is a word's number of tokens. A word takes one cell per token, and at least one per ten letters
    begun. `items` empty points of a numbered list follow the text, as in FigStep (Gong et al., AAAI 2025). Raises
    ValueError if the text has no words, or if they do not fit the 64 cells.
    """
    rng = Random(seed)
    words = [*text.split(), *(f"{number}." for number in range(1, items + 1))]
    widths = [cells(word, pieces) for word in words]
    places = flow(widths, rng, items)
    return draw(words, widths, places, choose_style(rng, fonts()), rng)


def fits(text: str, items: int = 0) -> bool:
    """Return whether `text` fits into a picture, without a tokenizer's `pieces`."""
    try:
        flow([*map(cells, text.split()), *[1] * items], Random(0), items)
    except ValueError:
        return False
    return True


def cells(word: str, pieces: Callable[[str], int] | None = None) -> int:
    """Return the number of cells for a word."""
    by_letters = math.ceil(len(word) / LETTERS_PER_CELL)
    return max(by_letters, pieces(word) if pieces else 1)


def flow(widths: Sequence[int], rng: Random, items: int = 0) -> list[Place]:
    """Return the first cell of each word, for lines of random length at a random place on the grid.

    Each of the last `items` words gets its own line. Raises ValueError if the words do not fit or there are none.
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
    """Break words, given by their widths in cells, greedily into lines of at most `measure` cells."""
    lines: list[list[int]] = [[]]
    for number, width in enumerate(widths):
        if sum(lines[-1]) + width > measure or number >= len(widths) - items:
            lines.append([])
        lines[-1].append(width)
    return lines


@functools.cache
def fonts() -> tuple[Path, ...]:
    """Return matplotlib's bundled text fonts, which are the same on every machine."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    found = [*folder.glob("DejaVuS*.ttf"), *folder.glob("STIXGeneral*.ttf")]
    return tuple(sorted(font for font in found if "Display" not in font.name))  # Display fonts have no letters


def choose_style(rng: Random, choice: Sequence[Path], variety: float = 1.0) -> Style:
    """Return a random style in a font of `choice`. `variety` 0 gives aligned black words on white, without noise."""
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
    """Return a dark ink and a light paper with enough contrast."""
    while True:
        ink: Colour = (rng.randint(0, 110), rng.randint(0, 110), rng.randint(0, 110))
        paper: Colour = (rng.randint(190, 255), rng.randint(190, 255), rng.randint(190, 255))
        if contrast(ink, paper) >= CONTRAST:
            return ink, paper


def contrast(one: Colour, other: Colour) -> float:
    """Return the WCAG contrast ratio of two colours, 1 to 21."""
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
    """Return a picture with each word in its cells. A word that is too long gets smaller letters."""
    scale = size / DESIGN
    picture = Image.new("RGB", (size, size), style.paper)
    canvas = ImageDraw.Draw(picture)
    for word, width, (row, column) in zip(words, widths, places, strict=True):
        room = scale * (width * CELL - 2 * MARGIN)  # pixels, like all lengths below
        font, length = _fitting(style.font, scale * style.letter_size, word, room)
        right = min(scale * STRAY * style.jitter * rng.random(), room - length)
        down = scale * STRAY * style.jitter * rng.uniform(-1, 1)
        x = scale * (column * CELL + MARGIN) + right
        baseline = scale * ((row + 0.5) * CELL - 1 + 0.35 * style.letter_size) + down
        canvas.text((x, baseline), word, style.ink, font, anchor="ls")
    return _with_noise(picture, style.noise, rng) if style.noise else picture


def _fitting(path: Path, letter_size: float, word: str, room: float) -> tuple[ImageFont.FreeTypeFont, float]:
    """Return the font at `letter_size` pixels or smaller, so that `word` fits `room` pixels, and the word's length."""
    halves = math.ceil(2 * letter_size)  # half pixels, to limit the number of cached fonts
    while True:
        font = _font(path, halves / 2)
        length = font.getlength(word)
        if length <= room or halves <= 2:
            return font, length
        # Letters do not shrink in proportion to the size, because hinting rounds them to whole pixels.
        halves = min(halves - 1, math.ceil(halves * room / length))


@functools.lru_cache(maxsize=4096)
def _font(path: Path, letter_size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, letter_size, layout_engine=ImageFont.Layout.BASIC)


def _with_noise(picture: Image.Image, amount: int, rng: Random) -> Image.Image:
    """Return the picture with each colour value changed by at most `amount`, uniformly distributed."""
    values = numpy.asarray(picture, dtype=numpy.int16)  # (size, size, 3)
    raw = numpy.frombuffer(rng.randbytes(values.size), dtype=numpy.uint8).reshape(values.shape)
    change = raw.astype(numpy.int16) * (2 * amount + 1) // 256 - amount
    return Image.fromarray(numpy.clip(values + change, 0, 255).astype(numpy.uint8))
