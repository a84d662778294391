"""What the guard costs: time to the verdict and to the first token against the plain model, side by side.

Both models are timed in turn on the same prompt, the order changing from round to round, so that whatever else the
machine does falls on both alike; ratios are of the medians of a prompt's rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sasa_export.prompts.prompt import Prompt
from sasa_export.research.evaluate.answer import Model

ROUNDS = 5


@dataclass(frozen=True)
class Ratio:
    """Patched against plain: median and quartiles of the prompts' ratios, and how many prompts."""

    median: float
    low: float
    high: float
    prompts: int

    def to_json(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in vars(self).items()}


@dataclass(frozen=True)
class Timing:
    """Ratios of prompts that are allowed and that are refused; None where there are none.

    `verdict` is one pass over the prompt against the plain model's, `first` the first token against the plain one's.
    """

    verdict: dict[str, Ratio]
    first: dict[str, Ratio]

    def to_json(self) -> dict[str, Any]:
        return {name: {kind: ratio.to_json() for kind, ratio in ratios.items()} for name, ratios in vars(self).items()}


def timed(
    plain: Model,
    guarded: Model,
    prompts: Sequence[tuple[str, Prompt]],
    advance: Callable[[int], None] = lambda count: None,
) -> Timing:
    """Time both models on prompts, each with its kind ("allowed" or "refused"); `advance` counts prompts."""
    found: dict[str, dict[str, list[float]]] = {"verdict": {}, "first": {}}
    for number, (kind, prompt) in enumerate(prompts):
        inputs = {"plain": plain.prepare(prompt), "guarded": guarded.prepare(prompt)}
        models = {"plain": plain, "guarded": guarded}
        spent: dict[tuple[str, str], list[float]] = {}
        # The very first calls allocate and compile, and are not counted.
        for turn in range(ROUNDS + (number == 0)):
            for name in sorted(models, reverse=bool(turn % 2)):
                for what in ("verdict", "first"):
                    run = models[name].judge if what == "verdict" else models[name].begin
                    before = time.perf_counter()
                    run(inputs[name])
                    if turn or number:
                        spent.setdefault((name, what), []).append(time.perf_counter() - before)
        for what, ratios in found.items():
            middle = {name: statistics.median(spent[name, what]) for name in models}
            ratios.setdefault(kind, []).append(middle["guarded"] / middle["plain"])
        advance(1)
    return Timing(*({kind: _ratio(values) for kind, values in found[what].items()} for what in ("verdict", "first")))


def choose(prompts: Sequence[Prompt], refused: Sequence[bool], count: int) -> list[tuple[str, Prompt]]:
    """`count` prompts evenly spaced, allowed and refused ones in equal numbers as far as there are some."""
    kinds = {"allowed": [p for p, no in zip(prompts, refused, strict=True) if not no],
             "refused": [p for p, no in zip(prompts, refused, strict=True) if no]}  # fmt: skip
    few = min(kinds, key=lambda kind: len(kinds[kind]))
    many = "allowed" if few == "refused" else "refused"
    wanted = {few: min(len(kinds[few]), count // 2)}
    wanted[many] = min(len(kinds[many]), count - wanted[few])
    return [
        (kind, kinds[kind][(2 * place + 1) * len(kinds[kind]) // (2 * wanted[kind])])
        for kind in ("allowed", "refused")
        for place in range(wanted[kind])
    ]


def _ratio(values: Sequence[float]) -> Ratio:
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return Ratio(median, low, high, len(values))
