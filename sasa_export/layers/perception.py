"""Safety perception: how well harmful and harmless prompts can be told apart by a plane, block by block."""

from __future__ import annotations

import numpy as np

from sasa_export.probe.folds import FOLDS
from sasa_export.probe.intervals import Comparable, auc_of
from sasa_export.probe.work import Results
from sasa_export.prompts.shares import labels_and_groups
from sasa_export.report import Silent

STRENGTH = 1e-3  # the inverse strength of regularization, on features of unit variance


def decision_values(states: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Cross-validated decision values (prompts,) of a logistic regression on states (prompts, hidden).

    Features are scaled to unit variance within each fold, since a few dimensions of a residual stream are larger
    than all others by orders of magnitude. The members of a group stay in one fold.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=500))
    folds = GroupKFold(min(FOLDS, len(set(groups))))
    states = states.astype(np.float64)
    return cross_val_predict(model, states, labels, groups=groups, cv=folds, method="decision_function")


def separability(results: Results, blocks: int, report: Silent) -> dict[str, list[Comparable]]:
    """AUC behind each block, of "all" prompts, and of each channel (text, picture) that has both labels.

    Where all prompts are of one channel, there is "all" alone.
    """
    labels, groups = labels_and_groups(results.prompts)
    channels = np.array([prompt.channel for prompt in results.prompts])
    rows = {"all": np.full(len(labels), True)}
    for channel in sorted(set(channels)) if len(set(channels)) > 1 else ():
        if len(set(labels[channels == channel])) == 2:
            rows[channel] = channels == channel
    curves: dict[str, list[Comparable]] = {name: [] for name in rows}
    with report.bar(blocks, "separate") as advance:
        for block in range(blocks):
            scores = decision_values(results.read("states", block), labels, groups)  # (prompts,)
            for name, chosen in rows.items():
                curves[name].append(auc_of(scores[chosen], labels[chosen], groups[chosen]))
            advance(1)
    return curves
