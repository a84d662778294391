"""Which prompts are run: enough of them, the pictures' controls, those that heads are ablated on, and halves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import numpy as np

from sasa_export.errors import LocateError
from sasa_export.prompts.prompt import Prompt
from sasa_export.research.prompts import kinds_of_groups, share_of, spaced

LEAST = 10  # groups of either label, below which nothing can be cross-validated
LIMIT = 400  # groups that layers are chosen on; the states of all blocks are kept for each of their prompts
CONTROLS = 120  # pictures that are compared with their controls


def label_of(prompt: Prompt) -> int:
    return prompt.label


def limited(prompts: Sequence[Prompt], groups: int) -> list[Prompt]:
    """About so many groups of prompts; all where there are no more. LocateError where they are too few."""
    labels = kinds_of_groups(prompts, label_of)
    kept = share_of(prompts, groups / len(labels), label_of)
    for label, what in ((1, "harmful"), (0, "harmless")):
        count = len({prompt.group for prompt in kept if prompt.label == label})
        if count < LEAST:
            raise LocateError(
                f"there are {count} groups with {what} prompts, and locating layers needs {LEAST} at least. "
                "Give more with --calibration, or raise --limit."
            )
    return kept


def controls(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Up to 120 picture prompts, evenly spaced, each with two controls behind it.

    They are the same request as text alone, and the same picture with nothing beside it. What the request is stands
    in `question` where the prompt merely accompanies a picture. A picture without any words beside it has no text-only
    control and is passed over.
    """
    pictures = [prompt for prompt in prompts if prompt.image is not None and (prompt.question or prompt.prompt).strip()]
    found = []
    for prompt in spaced(pictures, CONTROLS):
        asked = prompt.question or prompt.prompt
        text = replace(prompt, name=f"{prompt.name}, text", prompt=asked, channel="text", image=None, picture=None)
        found += [prompt, text, replace(prompt, name=f"{prompt.name}, image", prompt="")]
    return found


def ablated_on(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Up to `count` prompts of either label, evenly spaced.

    Both labels get as many of each channel, or a head that matters to pictures would pass for one that matters to
    whichever label has more of them.
    """
    held: dict[str, dict[int, list[int]]] = defaultdict(lambda: {1: [], 0: []})
    for row, prompt in enumerate(prompts):
        held[prompt.channel][prompt.label].append(row)
    most = {channel: min(len(rows[1]), len(rows[0])) for channel, rows in held.items()}
    shared = sorted((channel for channel in most if most[channel]), key=lambda channel: (most[channel], channel))
    if not shared:
        raise LocateError(
            "no kind of prompt (text, picture) comes with both labels, so that what heads do to harmful prompts cannot "
            "be told from what they do to that kind. Leave the ablation out: --ablation-prompts 0."
        )
    chosen: list[int] = []
    for place, channel in enumerate(shared):
        share = min(most[channel], (count - len(chosen) // 2) // (len(shared) - place))
        for rows in held[channel].values():
            chosen += spaced(rows, share)
    return [prompts[row] for row in sorted(chosen)]


def halves(prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of two halves that share no group, the kinds of groups in equal numbers; always the same ones."""
    labels = kinds_of_groups(prompts, label_of)
    # Shuffled within a kind, so that a set sorted by category does not put every second category aside.
    order = sorted(labels, key=lambda group: (labels[group], Random(group).random()))
    first = set(order[::2])
    inside = np.array([prompt.group in first for prompt in prompts])
    return np.flatnonzero(inside), np.flatnonzero(~inside)
