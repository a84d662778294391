"""Cross-validation folds that leave out whole kinds of prompts, so that choices carry over to new kinds."""

from collections.abc import Sequence

import numpy as np

from sasa_export.errors import CalibrationError
from sasa_export.prompts.prompt import Prompt
from sasa_export.prompts.shares import labels_and_groups

FOLDS = 5  # for folds by group
LEAST_KINDS = 4

Fold = tuple[np.ndarray, np.ndarray]  # rows to fit on, rows to judge


def folds_of(prompts: Sequence[Prompt]) -> list[Fold]:
    """Return folds that leave out each kind of prompt once, or five folds by group where kinds are few (`kinds_of`).

    Within a fold, no group has both a fitted and a judged prompt. Raise CalibrationError where a fold would have only
    one label to fit on.
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
    folds = [(train[~np.isin(groups[train], groups[test])], test) for train, test in splits]
    if any(len(set(labels[train])) < 2 for train, _ in folds):
        raise CalibrationError("a cross-validation fold has one class only: give more prompts of both labels.")
    return folds


def kinds_of(prompts: Sequence[Prompt]) -> np.ndarray | None:
    """Return the kind of each prompt, (prompts,), or None where the kinds are too few to leave one out."""
    kinds = np.array([prompt.kind for prompt in prompts])
    of_label = [{prompt.kind for prompt in prompts if prompt.label == label} for label in (0, 1)]
    return kinds if len(set(kinds)) >= LEAST_KINDS and min(map(len, of_label)) > 2 else None
