"""Sample labelled prompts in whole groups, and extract their labels, groups and counts."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from sasa_export.prompts.prompt import Prompt

Item = TypeVar("Item")


def spaced(items: Sequence[Item], count: int) -> list[Item]:
    """Return `count` of the items, evenly spaced, or all if there are fewer."""
    if count >= len(items):
        return list(items)
    return [items[(2 * place + 1) * len(items) // (2 * count)] for place in range(count)]


def kinds_of_groups(prompts: Sequence[Prompt], kind: Callable[[Prompt], Any]) -> dict[str, tuple[Any, ...]]:
    """Return the sorted kinds of prompt in each group. Groups with equal tuples are of one kind."""
    held: dict[str, set[Any]] = defaultdict(set)
    for prompt in prompts:
        held[prompt.group].add(kind(prompt))
    return {group: tuple(sorted(kinds)) for group, kinds in held.items()}


def share_of(prompts: Sequence[Prompt], share: float, kind: Callable[[Prompt], Any]) -> list[Prompt]:
    """Return about `share` of the prompts, in whole groups, evenly spaced. Each kind of group keeps its proportion."""
    if share >= 1:
        return list(prompts)
    groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for group, held in kinds_of_groups(prompts, kind).items():
        groups[held].append(group)
    kept = {group for alike in groups.values() for group in spaced(alike, max(1, round(len(alike) * share)))}
    return [prompt for prompt in prompts if prompt.group in kept]


def labels_and_groups(prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
    """Return the prompts' labels and groups, (prompts,) each."""
    return np.array([prompt.label for prompt in prompts]), np.array([prompt.group for prompt in prompts])


def counts(prompts: Sequence[Prompt]) -> dict[str, int]:
    """Return the number of harmful prompts, harmless prompts and groups."""
    harmful = sum(prompt.label for prompt in prompts)
    groups = len({prompt.group for prompt in prompts})
    return {"harmful": harmful, "harmless": len(prompts) - harmful, "groups": groups}
