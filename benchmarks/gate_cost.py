"""What the gate costs in torch, beside the plain model, at the default layers and at an early safety layer.

- prefill: a prompt as a whole, and in pieces, by hand.
- decoding: one token after another on a warm cache.
- second turn: a short prompt on the cache of a first one, of about 500 to 32,000 tokens.
- cache: bytes per token.

    python benchmarks/gate_cost.py [--out docs/results/gate-cost.md]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from side_by_side import (
    TURN,
    Pair,
    Row,
    Settings,
    Work,
    benchmark,
    compare,
    compare_sizes,
    decoding,
    early_layers,
    in_turn,
    make_pair,
    prefill,
)

PIECE = 64  # tokens
TIMES = (1, 4, 16, 64)  # how often the first turn is repeated in the cache


def in_pieces(model: Any, inputs: dict[str, Any]) -> Work:
    """The prompt in pieces, on one cache."""

    def work() -> None:
        ids, mask, cache = inputs["input_ids"], inputs["attention_mask"], None  # (1, tokens) both
        for start in range(0, ids.shape[1], PIECE):
            end = min(start + PIECE, ids.shape[1])
            piece = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end], "past_key_values": cache}
            cache = prefill(model, piece)().past_key_values

    return work


def second_turn(model: Any, inputs: dict[str, Any], times: int) -> Work:
    """The end of the prompt again, behind the whole prompt: it ends in the generation prompt, as a turn does.

    The cache has the prompt `times` over, each as the model left it: a long first turn, without the hours it takes.
    """
    cache = prefill(model, inputs)().past_key_values
    for layer in cache.layers:
        layer.keys, layer.values = (held.repeat(1, 1, times, 1) for held in (layer.keys, layer.values))
    tokens, ids = inputs["input_ids"].shape[1], inputs["input_ids"][:, -TURN:]  # (1, TURN)
    asked = {
        "input_ids": ids, "attention_mask": torch.ones(1, tokens * times + TURN, dtype=torch.long),
        "position_ids": torch.arange(tokens, tokens + TURN)[None],  # (1, TURN), behind the last in the cache
    }  # fmt: skip

    def work() -> None:
        prefill(model, {**asked, "past_key_values": cache})()
        cache.crop(-TURN)

    return work


def bytes_per_token(model: Any, inputs: dict[str, Any]) -> float:
    cache = prefill(model, inputs)().past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / inputs["input_ids"].shape[1]


def costs(pair: Pair, settings: Settings) -> list[Row]:
    """The rows on one pair."""
    tokens = pair.text["input_ids"].shape[1]

    def timed(kind: Any, *more: Any, rounds: int = settings.rounds) -> Any:
        work = {"plain": kind(pair.plain, pair.text, *more), "guarded": kind(pair.guarded, pair.text, *more)}
        return in_turn(work, rounds, settings.seconds)

    whole, pieces = timed(prefill), timed(in_pieces)
    rows = [
        compare(f"prefill of {tokens} tokens", whole.guarded, whole.plain),
        compare(f"the same in pieces of {PIECE} tokens, by hand", pieces.guarded, pieces.plain),
    ]
    for times in TIMES:
        second = timed(second_turn, times)
        rows.append(compare(f"a second turn of {TURN} tokens behind {tokens * times:,}", second.guarded, second.plain))
    steps = timed(decoding, rounds=settings.new_tokens)
    return [*rows, compare(f"decoding behind {tokens} tokens, per token", steps.guarded, steps.plain)]


@benchmark("What the gate costs")
def main(pair: Pair, settings: Settings, work: Path) -> dict[str, list[Row]]:
    """What the gate costs in torch, beside the plain model, at the default layers and at an early safety layer."""
    sizes = compare_sizes("cache, per token", *(bytes_per_token(m, pair.text) for m in (pair.guarded, pair.plain)))
    tables = {"Against the plain model": [*costs(pair, settings), sizes]}
    early = make_pair(early_layers(pair, settings), work / "early")
    return {**tables, f"Against the plain model, {early.settings}": costs(early, settings)}


if __name__ == "__main__":
    main()
