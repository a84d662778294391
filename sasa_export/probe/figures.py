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
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(self).items()}


def figures(feature: str, scores: np.ndarray, prompts: Sequence[Prompt], threshold: float) -> list[Figure]:
    """One figure a channel, and one for all together."""
    from sklearn.metrics import roc_auc_score

    labels = np.array([prompt.label for prompt in prompts])
    channels = np.array([prompt.channel for prompt in prompts])
    out = []
    for channel in ("text", "picture", "all"):
        rows = np.ones(len(prompts), bool) if channel == "all" else channels == channel
        if len(set(labels[rows])) < 2:
            continue
        score, label = scores[rows], labels[rows]
        out.append(
            Figure(
                feature,
                channel,
                int(rows.sum()),
                float(roc_auc_score(label, score)),
                float(((score >= 0.5) == label).mean()),
                float((score[label == 1] >= threshold).mean()),
                float((score[label == 0] >= threshold).mean()),
            )
        )
    return out


def verdict_on_projection(figures: Sequence[Figure]) -> str:
    """One sentence that says whether projection helped on this model, as measured."""
    by_feature = {figure.feature: figure for figure in figures if figure.channel == "all"}
    if "projected" not in by_feature:
        return f"**Made without projection (--projection none): AUC {by_feature['plain'].auc:.3f}.**"
    projected, plain = by_feature["projected"], by_feature["plain"]
    # Two AUCs on the same prompts: differences below this are noise at a few hundred prompts.
    margin = 1.0 / projected.prompts**0.5 / 2
    gain = projected.auc - plain.auc
    if gain > margin:
        word = "Projection helps on this model"
    elif gain < -margin:
        word = "Projection does not help on this model: it is worse than the plain probe"
    else:
        word = "Projection neither helps nor hurts on this model beyond noise"
    return f"**{word}: AUC {projected.auc:.3f} with it, {plain.auc:.3f} without.**"
