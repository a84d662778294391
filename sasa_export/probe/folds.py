"""What a choice is judged on: kinds of prompts that were left out whole, so that it carries over to new ones."""

from collections.abc import Sequence

import numpy as np

from sasa_export.errors import CalibrationError
from sasa_export.prompts.prompt import Prompt
from sasa_export.prompts.shares import labels_and_groups

FOLDS = 5  # where prompts are left out by group
LEAST_KINDS = 4

Fold = tuple[np.ndarray, np.ndarray]  # rows to fit on, rows to judge


def folds_of(prompts: Sequence[Prompt]) -> list[Fold]:
    """Each kind of prompt left out once; five folds by group where the prompts are of fewer than four kinds.

    No prompt is fitted on that shares its group with one that is judged. CalibrationError where a fold would be left
    with one label.
    """
    from sklearn.model_selection import GroupKFold, LeaveOneGroupOut

    labels, groups = labels_and_groups(prompts)
    kinds = kinds_of(prompts)
    if kinds is None:
        if len(set(groups)) < 2:
            raise CalibrationError('all prompts are of one "group", so none can be held out: give different groups.')
        splits = GroupKFold(min(FOLDS, len(set(groups)))).split(labels, labels, groups)
    else:
        splits = LeaveOneGroupOut().split(labels, labels, kinds)
    found = []
    for train, test in splits:
        train = train[~np.isin(groups[train], groups[test])]
        if len(set(labels[train])) < 2:
            raise CalibrationError("a cross-validation fold has one class only: give more prompts of both labels.")
        found.append((train, test))
    return found


def kinds_of(prompts: Sequence[Prompt]) -> np.ndarray | None:
    """The kind of each prompt, (prompts,), where there are enough to leave one out; else None."""
    kinds = np.array([prompt.kind for prompt in prompts])
    enough = len(set(kinds)) >= LEAST_KINDS and all(
        len({prompt.kind for prompt in prompts if prompt.label == label}) > 2 for label in (0, 1)
    )
    return kinds if enough else None
