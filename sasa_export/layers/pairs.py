"""Which blocks and which pairs of layers are tried: the default grid, and what the user asks for."""

from __future__ import annotations

import re
from itertools import product

from sasa_export.errors import LocateError

GRID = 7  # layers that the default grid takes for either side
SMALL = 10  # decoders of up to as many blocks are swept whole

Pair = tuple[int, int]  # safety layer, semantic layer


def grid_layers(blocks: int) -> list[int]:
    """The layers that the grid is made of: seven, evenly spaced from a sixth of the depth to the last but one."""
    if blocks <= SMALL:
        return list(range(blocks))
    first, last = round(blocks / 6), blocks - 2
    return sorted({round(first + (last - first) * step / (GRID - 1)) for step in range(GRID)})


def default_pairs(blocks: int, known: Pair | None = None) -> list[Pair]:
    """Every pair s < f of the grid's layers, each layer with one close behind it (as 13 and 15 of 32), and `known`."""
    layers = grid_layers(blocks)
    found = {(safety, semantic) for safety in layers for semantic in layers if safety < semantic}
    found |= {(layer, layer + _close(blocks)) for layer in layers if layer + _close(blocks) < blocks}
    return sorted(found | ({known} if known else set()))


def with_layer(blocks: int, safety: int | None, semantic: int | None) -> list[Pair]:
    """The default pairs with one side held: every layer of the grid that goes with the given one, and a close one."""
    layers = grid_layers(blocks)
    if safety is not None:
        behind = {*layers, safety + _close(blocks)}
        return sorted((safety, layer) for layer in behind if safety < layer < blocks) or [(safety, blocks - 1)]
    if semantic is not None:
        before = {*layers, semantic - _close(blocks)}
        return sorted((layer, semantic) for layer in before if 0 <= layer < semantic) or [(0, semantic)]
    return default_pairs(blocks)


def possible(pairs: list[Pair], earliest: int) -> list[Pair]:
    """The pairs whose safety layer is not before the `earliest` that a decoder can have. LocateError without any."""
    found = [pair for pair in pairs if pair[0] >= earliest]
    if not found:
        raise LocateError(
            f"the model adds to the hidden state between its first blocks, so the safety layer is {earliest} at the "
            "earliest, and no pair of layers that was asked for has such a one. Ask for later layers."
        )
    return found


def _close(blocks: int) -> int:
    return max(1, round(blocks / 16))


def parse_pairs(text: str, blocks: int) -> list[Pair]:
    """`13:15`, `10-16:14-20` (every combination with s < f), several behind commas. LocateError where it is not so."""
    found: set[Pair] = set()
    for part in text.split(","):
        numbers = re.fullmatch(r"(\d+)(?:-(\d+))?:(\d+)(?:-(\d+))?", part.strip(), re.ASCII)
        sides = numbers and (numbers.group(1, 2), numbers.group(3, 4))
        asked = list(product(*(range(int(low), int(high or low) + 1) for low, high in sides))) if sides else []
        pairs = {(safety, semantic) for safety, semantic in asked if safety < semantic}
        if not pairs or max(map(max, asked)) >= blocks:
            raise LocateError(
                f"--pairs has {part.strip()!r}; give a safety layer and a semantic layer behind it, such as 13:15, or "
                f"ranges, 10-16:14-20. The blocks of this model are 0 to {blocks - 1}."
            )
        found |= pairs
    return sorted(found)
