"""The figures of a calibration, on kinds of prompts that were left out of the fit, with and without projection."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sasa_export.probe.intervals import Share, is_above, wilson
from sasa_export.prompts.prompt import Prompt


@dataclass(frozen=True)
class Figure:
    """Figures of one feature on a part of the prompts. Rates are shares of 1, None where the part has no such prompts.

    `recall`, `false_positive_rate` and `borderline_rate` are the shares of harmful, ordinary and borderline prompts at
    or above the threshold. `auc` compares harmful prompts with ordinary prompts.
    """

    feature: str  # "projected" or "plain"
    part: str  # "all", a channel ("text" or "picture"), or how a request is asked (`Prompt.setting`)
    prompts: int
    groups: int
    auc: float
    recall: float
    false_positive_rate: float
    borderline_rate: float | None
    harmful: int  # number of prompts behind `recall`
    ordinary: int  # number of prompts behind `false_positive_rate`

    @property
    def beats_chance(self) -> bool:
        """Return whether harmful prompts are refused more often than ordinary ones, beyond noise."""
        return is_above(*self._shares())

    @property
    def refused(self) -> str:
        """Return both shares in words, with their intervals."""
        return "{} of {harmful} harmful and {} of {ordinary} ordinary ones are refused".format(
            *self._shares(), harmful=self.harmful, ordinary=self.ordinary
        )

    @property
    def caught(self) -> Share:
        """Return `recall` with its interval."""
        return wilson(round(self.recall * self.harmful), self.harmful)

    def _shares(self) -> tuple[Share, Share]:
        """Return `recall` and `false_positive_rate` with their intervals."""
        return self.caught, wilson(round(self.false_positive_rate * self.ordinary), self.ordinary)


@dataclass(frozen=True)
class KindFigure:
    """AUC on one kind of prompt, by probes and a bag of words that were fitted without that kind.

    For a kind with a single label, AUC is computed against all prompts with the other label.
    """

    kind: str
    prompts: int
    projected: float | None
    plain: float
    words: float


def rounded(figure: Figure | KindFigure) -> dict[str, Any]:
    """Return the figure's fields, with numbers rounded to four places."""
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(figure).items()}


def figures(feature: str, scores: np.ndarray, prompts: Sequence[Prompt], threshold: float) -> list[Figure]:
    """Return a figure for each part that has both labels: all prompts, then channels, then ways of asking
    (`Prompt.setting`).

    Args: scores: P(unsafe), (prompts,).
    """
    of_parts = []
    for part, rows in _parts(prompts):
        shown, refused = [prompts[row] for row in rows], scores[rows] >= threshold
        harmful, ordinary = np.array([prompt.label == 1 for prompt in shown]), ordinary_rows(shown)
        borderline = ~harmful & ~ordinary
        if harmful.any() and ordinary.any():
            of_parts.append(
                Figure(
                    feature, part, len(shown), len({prompt.group for prompt in shown}),
                    _area(scores[rows], harmful, ordinary),
                    float(refused[harmful].mean()), float(refused[ordinary].mean()),
                    float(refused[borderline].mean()) if borderline.any() else None,
                    int(harmful.sum()), int(ordinary.sum()),
                )
            )  # fmt: skip
    return of_parts


def _parts(prompts: Sequence[Prompt]) -> Iterator[tuple[str, np.ndarray]]:
    yield "all", np.arange(len(prompts))
    for name in ("channel", "setting"):
        values = np.array([getattr(prompt, name) for prompt in prompts])
        kinds = list(dict.fromkeys(values.tolist()))
        yield from ((kind, np.flatnonzero(values == kind)) for kind in kinds if len(kinds) > 1)


def ordinary_rows(prompts: Sequence[Prompt]) -> np.ndarray:
    """Return which prompts are ordinary, (prompts,), bool. If all harmless prompts are borderline, return those."""
    harmless = np.array([prompt.label == 0 for prompt in prompts])
    ordinary = harmless & ~np.array([prompt.borderline for prompt in prompts])
    return ordinary if ordinary.any() else harmless


def kind_figures(prompts: Sequence[Prompt], kinds: np.ndarray, scores: dict[str, np.ndarray]) -> list[KindFigure]:
    """Return a figure for each of `kinds` (prompts,). `scores` (prompts,): "plain", "words", and maybe "projected"."""
    labels = np.array([prompt.label for prompt in prompts])
    of_kinds = []
    for kind in dict.fromkeys(kinds.tolist()):
        sides = [(kinds == kind) & (labels == label) for label in (1, 0)]
        sides = [side if side.any() else labels == label for side, label in zip(sides, (1, 0), strict=True)]
        areas = {name: _area(values, *sides) for name, values in scores.items()}
        count = int((kinds == kind).sum())
        of_kinds.append(KindFigure(kind, count, areas.get("projected"), areas["plain"], areas["words"]))
    return of_kinds


def _area(scores: np.ndarray, harmful: np.ndarray, harmless: np.ndarray) -> float:
    """Return the AUC of scores (prompts,) between two sets of prompts, (prompts,), bool."""
    from sklearn.metrics import roc_auc_score

    rows = harmful | harmless
    return float(roc_auc_score(harmful[rows], scores[rows]))


def verdict_on_projection(figures: Sequence[Figure]) -> str:
    """Return a sentence on the effect of projection on this model, by the harmful prompts refused at the threshold."""
    by_feature = {figure.feature: figure for figure in figures if figure.part == "all"}
    plain, projected = by_feature["plain"], by_feature.get("projected")
    if projected is None:
        return f"Made without projection (--projection none): AUC {plain.auc:.3f}."
    with_it, without = projected.caught, plain.caught
    effect = "neither helps nor hurts on this model beyond noise"
    if is_above(with_it, without):
        effect = "helps on this model"
    elif is_above(without, with_it):
        effect = "does not help on this model: try --projection none, which costs nothing"
    return (
        f"Projection {effect}: {with_it} of the harmful refused and an AUC of {projected.auc:.3f} with it, {without} "
        f"and {plain.auc:.3f} without."
    )
