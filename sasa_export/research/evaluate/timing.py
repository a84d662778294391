"""What the gate costs: time to the verdict and to the first token against the plain model, side by side.

Both models are timed in turn on the same prompt, the order changing from round to round, so that whatever else the
machine does falls on both alike; ratios are of the medians of a prompt's rounds.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

import numpy as np

from sasa_export.probe.intervals import Estimate
from sasa_export.prompts.prompt import Prompt
from sasa_export.prompts.shares import spaced

ROUNDS = 5


@dataclass(frozen=True)
class Timing:
    """The patched model's time over the plain model's on prompts of one kind: median and quartiles.

    `verdict` is one pass over the prompt against the plain model's, `first_token` the first token's against the plain
    one's.
    """

    prompts: int
    verdict: Estimate
    first_token: Estimate


def timed(
    plain: Callable[[], Any],
    patched: Callable[[], Any],
    prompts: Sequence[tuple[str, Prompt]],
    advance: Callable[[int], None],
) -> dict[str, Timing]:
    """Time both models on prompts, each with its kind ("allowed" or "refused"); `advance` counts prompts.

    The models are loaded where there are prompts."""
    ratios: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for number, (kind, prompt) in enumerate(prompts):
        models = [(model, model.prepare([prompt])) for model in (plain(), patched())]
        spent = np.zeros((ROUNDS + 1, 2, 2))  # (rounds, plain or patched, verdict or first token), seconds
        # The very first calls allocate and compile: round 0 of the first prompt is not counted, and others have none.
        for turn in range(number > 0, ROUNDS + 1):
            for which in (0, 1) if turn % 2 else (1, 0):
                model, inputs = models[which]
                for what, run in enumerate((model.judge, model.begin)):
                    before = time.perf_counter()
                    run(inputs)
                    spent[turn, which, what] = time.perf_counter() - before
        middle = np.median(spent[1:], axis=0)  # (plain or patched, verdict or first token)
        ratios[kind].append(tuple(middle[1] / middle[0]))
        advance(1)
    return {
        kind: Timing(len(found), *(_quartiles(values) for values in zip(*found, strict=True)))
        for kind, found in ratios.items()
    }


def choose(prompts: Sequence[Prompt], refused: Sequence[bool], count: int) -> list[tuple[str, Prompt]]:
    """`count` prompts evenly spaced, allowed and refused ones in equal numbers as far as there are some."""
    allowed = [prompt for prompt, no in zip(prompts, refused, strict=True) if not no]
    denied = [prompt for prompt, no in zip(prompts, refused, strict=True) if no]
    if len(denied) < len(allowed):
        wanted = min(len(denied), count // 2)
    else:
        wanted = count - min(len(allowed), count // 2)
    kinds = {"allowed": spaced(allowed, count - wanted), "refused": spaced(denied, wanted)}
    return [(kind, prompt) for kind, chosen in kinds.items() for prompt in chosen]


def _quartiles(values: Sequence[float]) -> Estimate:
    low, middle, high = quantiles(values, n=4) if len(values) > 1 else (*values, *values, *values)
    return Estimate(middle, low, high)
