"""Safety perception: how well harmful and harmless prompts can be told apart by a plane, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sasa_export.probe.fit import FOLDS
from sasa_export.prompts.prompt import Prompt
from sasa_export.research.locate.interval import Estimate, auc_of, is_below

STRENGTH = 1e-3  # the inverse strength of regularization, on features of unit variance


@dataclass(frozen=True)
class Separability:
    """AUC behind each block; `channels` holds the same for text and for pictures alone."""

    overall: tuple[Estimate, ...]
    channels: dict[str, tuple[Estimate, ...]]

    def blocks_within_noise(self) -> list[int]:
        """The blocks whose AUC is not below the best one's by more than noise."""
        best = max(self.overall, key=lambda estimate: estimate.value)
        count = len(self.overall)
        return [block for block, estimate in enumerate(self.overall) if not is_below(estimate, best, count)]

    def to_json(self) -> dict[str, Any]:
        curves = {"all": self.overall, **self.channels}
        return {channel: [estimate.to_json() for estimate in curve] for channel, curve in curves.items()}


def scores_of(states: np.ndarray, labels: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Cross-validated decision values (prompts,) of a logistic regression on states (prompts, hidden).

    Features are scaled to unit variance within each fold, since a few dimensions of a residual stream are larger
    than all others by orders of magnitude. The members of a group stay in one fold.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    scores = np.zeros(len(labels))
    for train, test in GroupKFold(min(FOLDS, len(set(groups)))).split(states, labels, groups):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=500))
        model.fit(states[train].astype(np.float64), labels[train])
        scores[test] = model.decision_function(states[test].astype(np.float64))
    return scores


def separability(scores: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> Separability:
    """The curves from each block's scores (prompts,)."""
    labels = np.array([prompt.label for prompt in prompts])
    groups = np.array([prompt.group for prompt in prompts])
    channel_of = np.array([prompt.channel for prompt in prompts])
    channels = {}
    for channel in sorted(set(channel_of)):
        rows = channel_of == channel
        if len(set(channel_of)) > 1 and len(set(labels[rows])) == 2:
            channels[channel] = tuple(auc_of(score[rows], labels[rows], groups[rows].tolist()) for score in scores)
    return Separability(tuple(auc_of(score, labels, groups.tolist()) for score in scores), channels)
