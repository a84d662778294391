"""Which prompts are run: enough of them, the pictures' controls, and halves."""

from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from random import Random

import numpy as np

from sasa_export.errors import LocateError
from sasa_export.prompts.prompt import Prompt, asked
from sasa_export.prompts.shares import kinds_of_groups, share_of, spaced

LEAST = 10  # groups of either label, below which nothing can be cross-validated
CONTROLS = 120  # pictures that are compared with their controls


def limited(prompts: Sequence[Prompt], groups: int) -> list[Prompt]:
    """About so many groups of prompts; all where there are no more. LocateError where they are too few."""
    kept = share_of(prompts, groups / len({prompt.group for prompt in prompts}), attrgetter("label"))
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
    pictures = [prompt for prompt in prompts if prompt.image is not None and asked(prompt).strip()]
    found = []
    for prompt in spaced(pictures, CONTROLS):
        words, name = asked(prompt), f"{prompt.name}, text"
        text = replace(prompt, name=name, prompt=words, channel="text", image=None, picture=None)
        found += [prompt, text, replace(prompt, name=f"{prompt.name}, image", prompt="")]
    return found


def halves(prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of two halves that share no group, the kinds of groups in equal numbers; always the same ones."""
    labels = kinds_of_groups(prompts, attrgetter("label"))
    # Shuffled within a kind, so that a set sorted by category does not put every second category aside.
    order = sorted(labels, key=lambda group: (labels[group], Random(group).random()))
    first = set(order[::2])
    inside = np.array([prompt.group in first for prompt in prompts])
    return np.flatnonzero(inside), np.flatnonzero(~inside)
