"""What a calibration measured, honestly: cross-validated, with and without projection, text and picture apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sasa_export.prompts.prompt import Prompt


@dataclass(frozen=True)
class Figure:
    """Figures of one feature on one channel; rates are shares of 1."""

    feature: str  # "projected" or "plain"
    channel: str  # "text", "picture" or "all"
    prompts: int
    auc: float
    accuracy: float  # at P = 0.5
    recall: float  # share of harmful prompts at or above the threshold
    false_positive_rate: float  # share of harmless prompts at or above the threshold

    def to_json(self) -> dict[str, Any]:
        """Its fields, rounded to four places."""
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(self).items()}


def figures(feature: str, scores: np.ndarray, prompts: Sequence[Prompt], threshold: float) -> list[Figure]:
    """One figure a channel that has both labels, and last the one for all prompts. `scores`: P(unsafe), (prompts,)."""
    from sklearn.metrics import roc_auc_score

    labels = np.array([prompt.label for prompt in prompts])
    channels = np.array([prompt.channel for prompt in prompts])
    found = []
    for channel in ("text", "picture", "all"):
        rows = (channels == channel) | (channel == "all")
        label, score = labels[rows], scores[rows]
        if len(set(label)) == 2:
            refused = score >= threshold
            found.append(
                Figure(
                    feature,
                    channel,
                    len(label),
                    auc=float(roc_auc_score(label, score)),
                    accuracy=float(((score >= 0.5) == label).mean()),
                    recall=float(refused[label == 1].mean()),
                    false_positive_rate=float(refused[label == 0].mean()),
                )
            )
    return found


def verdict_on_projection(figures: Sequence[Figure]) -> str:
    """One sentence that says whether projection helped on this model, as measured."""
    by_feature = {figure.feature: figure for figure in figures if figure.channel == "all"}
    plain, projected = by_feature["plain"], by_feature.get("projected")
    if projected is None:
        return f"**Made without projection (--projection none): AUC {plain.auc:.3f}.**"
    # Two AUCs on the same prompts: differences below this are noise at a few hundred prompts.
    margin = 1.0 / projected.prompts**0.5 / 2
    word = "Projection neither helps nor hurts on this model beyond noise"
    if projected.auc > plain.auc + margin:
        word = "Projection helps on this model"
    elif projected.auc < plain.auc - margin:
        word = "Projection does not help on this model: it is worse than the plain probe"
    return f"**{word}: AUC {projected.auc:.3f} with it, {plain.auc:.3f} without.**"
