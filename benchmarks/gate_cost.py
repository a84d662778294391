"""What the gate costs in torch, beside the plain model.

- prefill: a prompt as a whole, against the floor that the number of blocks sets too; and in pieces, by hand.
- decoding: one token after another on a warm cache.
- second turn: a short prompt on the cache of a long first one, over all of which the second lane runs.
- cache: bytes per token.

    python benchmarks/gate_cost.py [--out docs/gate-cost.md]
"""

from __future__ import annotations

from typing import Any

import torch
from side_by_side import Pair, Row, Settings, Work, benchmark, compare, compare_sizes, decoding, in_turn, prefill

PIECE = 64  # tokens
TURN = 24  # tokens


def in_pieces(model: Any, inputs: dict[str, Any]) -> Work:
    """The prompt in pieces, on one cache."""

    def work() -> None:
        ids, mask, cache = inputs["input_ids"], inputs["attention_mask"], None  # (1, tokens) both
        for start in range(0, ids.shape[1], PIECE):
            end = min(start + PIECE, ids.shape[1])
            piece = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end], "past_key_values": cache}
            cache = prefill(model, piece)().past_key_values

    return work


def second_turn(model: Any, inputs: dict[str, Any]) -> Work:
    """The end of the prompt again, behind the whole prompt: it ends in the generation prompt, as a turn does."""
    cache = prefill(model, inputs)().past_key_values
    ids = inputs["input_ids"][:, -TURN:]  # (1, TURN)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], dim=1)  # (1, tokens + TURN)

    def work() -> None:
        prefill(model, {"input_ids": ids, "attention_mask": mask, "past_key_values": cache})()
        cache.crop(-TURN)

    return work


def bytes_per_token(model: Any, inputs: dict[str, Any]) -> float:
    cache = prefill(model, inputs)().past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / inputs["input_ids"].shape[1]


@benchmark("What the gate costs")
def main(pair: Pair, settings: Settings, work: Any) -> dict[str, list[Row]]:
    """What the gate costs in torch, beside the plain model."""
    tokens = pair.text["input_ids"].shape[1]

    def timed(kind: Any, rounds: int = settings.rounds) -> Any:
        work = {"plain": kind(pair.plain, pair.text), "guarded": kind(pair.guarded, pair.text)}
        return in_turn(work, rounds, settings.seconds)

    whole, pieces, second = timed(prefill), timed(in_pieces), timed(second_turn)
    steps = timed(decoding, settings.new_tokens)
    rows = [
        compare(f"prefill of {tokens} tokens", whole.guarded, whole.plain),
        compare("the same, against the floor", whole.guarded, whole.plain * pair.floor),
        compare(f"the same in pieces of {PIECE} tokens, by hand", pieces.guarded, pieces.plain),
        compare(f"a second turn of {TURN} tokens behind {tokens}", second.guarded, second.plain),
        compare(f"decoding behind {tokens} tokens, per token", steps.guarded, steps.plain),
        compare_sizes("cache, per token", *(bytes_per_token(model, pair.text) for model in (pair.guarded, pair.plain))),
    ]
    return {"Against the plain model": rows}


if __name__ == "__main__":
    main()
