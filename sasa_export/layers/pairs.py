"""The pairs of safety and semantic layer to measure: a default grid, or the user's choice."""

import re
from itertools import product

from sasa_export.errors import LocateError

GRID = 7  # layers in the default grid
SMALL = 10  # in decoders of up to this many blocks, the grid is every block

Pair = tuple[int, int]  # safety layer, semantic layer


def grid_layers(blocks: int) -> list[int]:
    """Return the grid's layers: seven, evenly spaced from a sixth of the depth to the last block but one."""
    if blocks <= SMALL:
        return list(range(blocks))
    first, last = round(blocks / 6), blocks - 2
    return sorted({round(first + (last - first) * step / (GRID - 1)) for step in range(GRID)})


def default_pairs(blocks: int, safety: int | None = None, semantic: int | None = None) -> list[Pair]:
    """Return the pairs s < f of the grid's layers, and each layer with a close later one (such as 13 and 15 of 32).
    With one layer given, return its pairs with the grid's layers and with a close one."""
    layers, close = grid_layers(blocks), max(1, round(blocks / 16))
    if semantic is None:
        first = layers if safety is None else [safety]
        pairs = {(layer, later) for layer in first for later in (*layers, layer + close)}
    else:
        pairs = {(earlier, semantic) for earlier in (*layers, semantic - close)}
    inside = sorted(pair for pair in pairs if 0 <= pair[0] < pair[1] < blocks)
    return inside or [(safety or 0, blocks - 1 if semantic is None else semantic)]


def possible(pairs: list[Pair], earliest: int) -> list[Pair]:
    """Return the pairs whose safety layer is `earliest` or later. Raises LocateError if none is."""
    late_enough = [pair for pair in pairs if pair[0] >= earliest]
    if not late_enough:
        raise LocateError(
            f"the model adds to the hidden state between its first blocks, so the safety layer is {earliest} at the "
            "earliest, and no pair of layers that was asked for has such a one. Ask for later layers."
        )
    return late_enough


def parse_pairs(text: str, blocks: int) -> list[Pair]:
    """Return the pairs s < f in a text like `10-16:14-20,13:15`. Raises LocateError if malformed or out of range."""
    pairs: set[Pair] = set()
    for part in text.split(","):
        numbers = re.fullmatch(r"(\d+)(?:-(\d+))?:(\d+)(?:-(\d+))?", part.strip(), re.ASCII)
        sides = numbers and (numbers.group(1, 2), numbers.group(3, 4))
        asked = list(product(*(range(int(low), int(high or low) + 1) for low, high in sides))) if sides else []
        upward = {(safety, semantic) for safety, semantic in asked if safety < semantic}
        if not upward or max(map(max, asked)) >= blocks:
            raise LocateError(
                f"--pairs has {part.strip()!r}; give a safety layer and a semantic layer behind it, such as 13:15, or "
                f"ranges, 10-16:14-20. The blocks of this model are 0 to {blocks - 1}."
            )
        pairs |= upward
    return sorted(pairs)
