"""Select the prompts to run: a limited number of groups, controls for pictures, and two halves."""

from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from random import Random

import numpy as np

from sasa_export.errors import LocateError
from sasa_export.prompts.prompt import Prompt, asked
from sasa_export.prompts.shares import kinds_of_groups, share_of, spaced

LEAST = 10  # groups of each label that cross-validation needs
CONTROLS = 120  # largest number of picture prompts to compare with controls


def limited(prompts: Sequence[Prompt], groups: int) -> list[Prompt]:
    """Return the prompts of about `groups` groups, or all if fewer. Raises LocateError below `LEAST` of a label."""
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
    """Return up to 120 picture prompts, evenly spaced, each followed by its two controls.

    The text-only control is the request as text alone: `question` if set, else the prompt's text. The image-dominant
    control is the picture without text. A prompt without text or question is skipped, as it has no text-only
    control.
    """
    pictures = [prompt for prompt in prompts if prompt.image is not None and asked(prompt).strip()]
    controlled = []
    for prompt in spaced(pictures, CONTROLS):
        words, name = asked(prompt), f"{prompt.name}, text"
        text = replace(prompt, name=name, prompt=words, channel="text", image=None, picture=None)
        controlled += [prompt, text, replace(prompt, name=f"{prompt.name}, image", prompt="")]
    return controlled


def halves(prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
    """Return the row numbers of two halves without common groups, balanced by kind. The split is deterministic."""
    labels = kinds_of_groups(prompts, attrgetter("label"))
    # Groups are shuffled within a kind. Otherwise, in a set sorted by category, a half could lack whole categories.
    order = sorted(labels, key=lambda group: (labels[group], Random(group).random()))
    first = set(order[::2])
    inside = np.array([prompt.group in first for prompt in prompts])
    return np.flatnonzero(inside), np.flatnonzero(~inside)
