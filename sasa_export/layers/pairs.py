"""Which blocks and which pairs of layers are tried: the default grid, and what the user asks for."""

from __future__ import annotations

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
        sides = part.split(":")
        if len(sides) != 2:
            raise LocateError(f"--pairs has {part.strip()!r}; a pair is s:f, such as 13:15, or ranges, 10-16:14-20.")
        safety, semantic = (parse_blocks(side, blocks, "--pairs") for side in sides)
        combined = {(first, second) for first in safety for second in semantic if first < second}
        if not combined:
            raise LocateError(f"--pairs has {part.strip()!r}, and a safety layer lies before its semantic layer.")
        found |= combined
    return sorted(found)


def parse_blocks(text: str, blocks: int, flag: str = "--blocks") -> list[int]:
    """`8-20`, or `3`, several behind commas. LocateError where it is not so or leaves the decoder."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            low, high = int(first), int(last if dash else first)
        except ValueError:
            raise LocateError(f"{flag} has {part.strip()!r}; give blocks as numbers or ranges, such as 8-20.") from None
        if not 0 <= low <= high < blocks:
            raise LocateError(
                f"{flag} has {part.strip()!r}, and the blocks of this model are 0 to {blocks - 1}, in rising order."
            )
        found.update(range(low, high + 1))
    return sorted(found)
