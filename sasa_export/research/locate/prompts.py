"""Which prompts are run: a share of the set, the pictures' controls, and the prompts that heads are ablated on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from sasa_export.errors import LocateError
from sasa_export.prompts.prompt import Prompt

Item = TypeVar("Item")

LEAST = 10  # prompts of either label, below which nothing can be cross-validated
CONTROLS = 120  # pictures that are compared with their controls


def limited(prompts: Sequence[Prompt], pairs: int | None) -> list[Prompt]:
    """About `pairs` groups of prompts, evenly spaced, the kinds of groups in proportion. LocateError for too few."""
    kinds: dict[tuple[int, ...], list[str]] = defaultdict(list)
    labels: dict[str, set[int]] = defaultdict(set)
    for prompt in prompts:
        labels[prompt.group].add(prompt.label)
    for group, held in labels.items():
        kinds[tuple(sorted(held))].append(group)
    kept = set(labels)
    if pairs is not None and pairs < len(labels):
        kept = {
            group for groups in kinds.values() for group in spaced(groups, round(len(groups) * pairs / len(labels)))
        }
    chosen = [prompt for prompt in prompts if prompt.group in kept]
    for label, what in ((1, "harmful"), (0, "harmless")):
        found = {prompt.group for prompt in chosen if prompt.label == label}
        if len(found) < LEAST:
            raise LocateError(
                f"there are {len(found)} groups with {what} prompts, and locating layers needs {LEAST} at least. "
                "Give more with --calibration, or raise --limit."
            )
    return chosen


@dataclass(frozen=True)
class Control:
    """A picture prompt, the same request as text alone, and the same picture with nothing beside it."""

    both: Prompt
    text: Prompt
    image: Prompt


def controls(prompts: Sequence[Prompt]) -> list[Control]:
    """The controls of up to 120 picture prompts, evenly spaced.

    The text-only control asks what the picture prompt asks: `question` where the prompt merely accompanies a
    picture, else its own words. A picture without any words beside it has none and is passed over.
    """
    pictures = [prompt for prompt in prompts if prompt.image is not None and (prompt.question or prompt.prompt).strip()]
    found = []
    for prompt in spaced(pictures, CONTROLS):
        asked = prompt.question or prompt.prompt
        text = replace(prompt, name=f"{prompt.name}, text", prompt=asked, channel="text", image=None, picture=None)
        image = replace(prompt, name=f"{prompt.name}, image", prompt="")
        found.append(Control(prompt, text, image))
    return found


def ablated_on(prompts: Sequence[Prompt], count: int) -> dict[int, list[int]]:
    """Row numbers of up to `count` prompts of either label (1, 0), evenly spaced.

    Both labels get as many of each channel, or a head that matters to pictures would pass for one that matters to
    whichever label has more of them.
    """
    held: dict[str, dict[int, list[int]]] = defaultdict(lambda: {1: [], 0: []})
    for row, prompt in enumerate(prompts):
        held[prompt.channel][prompt.label].append(row)
    rooms = {channel: min(len(rows[1]), len(rows[0])) for channel, rows in held.items()}
    if not any(rooms.values()):
        raise LocateError(
            "no kind of prompt (text, picture) comes with both labels, so that what heads do to harmful prompts cannot "
            "be told from what they do to that kind. Leave the ablation out: --ablation-prompts 0."
        )
    found: dict[int, list[int]] = {1: [], 0: []}
    shared = sorted((channel for channel in rooms if rooms[channel]), key=lambda channel: (rooms[channel], channel))
    for left, channel in enumerate(shared):
        room = min(rooms[channel], (count - len(found[1])) // (len(shared) - left))
        for label in (1, 0):
            found[label] += spaced(held[channel][label], room)
    return {label: sorted(rows) for label, rows in found.items()}


def spaced(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of the items, evenly spaced; all where there are no more."""
    if count >= len(items):
        return list(items)
    return [items[(2 * place + 1) * len(items) // (2 * count)] for place in range(count)]
