"""The pictures of a report; every function gives the bytes of a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sasa_export.probe.intervals import Estimate
from sasa_export.research import theme
from sasa_export.research.evaluate.measure import Evaluated

COLOURS = {
    "patched": theme.SAFETY,
    "against": theme.HARMFUL,
    "with": theme.SEMANTIC,
    "without": theme.SEMANTIC,
    "words": theme.HARMLESS,
}
BINS = np.linspace(0, 1, 41)
BORDERLINE = "borderline"  # the category or attack of harmless prompts that are made to look harmful


def pictures(found: Evaluated) -> dict[str, bytes]:
    """All pictures by name."""
    drawn = {"answers": bars(found), "roc": roc(found), "scores": scores(found)}
    return {**drawn, "depth": depth(found)} if found.depth else drawn


def bars(found: Evaluated) -> bytes:
    """Attack success rate and over-refusal of every arm, with intervals."""
    arms = list(found.arms.values())
    with theme.drawing(1.2 + 0.52 * len(arms)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        _bars(left, "Attack success", [arm["attack"] for arm in arms], theme.HARMFUL)
        _bars(right, "Over-refusal", [arm["over_refusal"] for arm in arms], theme.HARMLESS)
        left.set_yticks(range(len(arms)), [arm["title"].replace(" (", "\n(") for arm in arms])
        left.invert_yaxis()
        return theme.png(figure)


def _bars(axis: Any, title: str, shares: Sequence[Estimate], colour: str) -> None:
    for place, share in enumerate(shares):
        axis.barh(place, 100 * share.value, 0.62, color=colour, alpha=0.85)
        axis.plot([100 * share.low, 100 * share.high], [place, place], "|-", color=theme.INK, linewidth=1)
        axis.annotate(share.short, (100 * share.high, place), (6, 0), textcoords="offset points", va="center")
    # Each side has its own scale, or the bars of a small share could not be told apart.
    axis.set(xlim=(0, 130 * max(0.1, *(share.high for share in shares))), xlabel="%", title=title)


def roc(found: Evaluated) -> bytes:
    """The ROC curve of every arm that detects, with the point at its threshold."""
    from sklearn.metrics import roc_curve

    with theme.drawing(5.2, 5.6) as figure:
        axis = _unit_square(figure, "share of harmless prompts flagged", "share of harmful prompts flagged")
        for key in found.detecting:
            arm, scored = found.arms[key], found.answers[f"{key}_unsafe_probability"]
            wrong, caught, _ = roc_curve(found.answers.label, scored, drop_intermediate=False)
            area = f", AUC {arm['auc'].short}" if "auc" in arm else ""
            axis.plot(wrong, caught, color=COLOURS[key], linewidth=1.8, label=f"{arm['title']}{area}")
            if "caught" in arm:
                axis.plot(arm["false_positives"].value, arm["caught"].value, "o", color=COLOURS[key], markersize=7)
        axis.set_title("Large dots: the threshold of the calibration")
        axis.legend(loc="lower right", fontsize=8.5)
        return theme.png(figure)


def scores(found: Evaluated) -> bytes:
    """How the scores of harmful and harmless prompts lie, for every arm that detects."""
    asked = found.answers
    near = (asked.attack + asked.category).str.contains(BORDERLINE)
    kinds = {
        "harmless": (theme.HARMLESS, (asked.label == 0) & ~near),
        "harmless, borderline": (theme.SAFETY, (asked.label == 0) & near),
        "harmful": (theme.HARMFUL, asked.label == 1),
    }
    with theme.drawing(0.9 + 1.6 * len(found.detecting)) as figure:
        axes = figure.subplots(len(found.detecting), 1, sharex=True)
        for axis, key in zip(axes, found.detecting, strict=True):
            for name, (colour, rows) in kinds.items():
                if rows.any():
                    weights = np.full(rows.sum(), 100 / rows.sum())
                    axis.hist(asked[f"{key}_unsafe_probability"][rows], BINS, weights=weights, label=name,
                              histtype="stepfilled", facecolor=(colour, 0.45), edgecolor=colour)  # fmt: skip
            if found.arms[key]["threshold"] is not None:
                axis.axvline(found.arms[key]["threshold"], color=theme.INK, linewidth=1.2, linestyle="--")
            axis.set_title(found.arms[key]["title"], fontsize=10)
            axis.set_ylabel("% of kind")
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=9)
        axes[-1].set(xlim=(0, 1), xlabel="P(unsafe); dashed: the threshold of the calibration")
        return theme.png(figure)


def depth(found: Evaluated) -> bytes:
    """The AUC of probing at each block of the second lane, against the blocks that the prompt runs through."""
    costs, areas = [of["cost"] for of in found.depth], [of["auc"] for of in found.depth]
    with theme.drawing(3.8) as figure:
        axis = figure.subplots()
        theme.band(axis, costs, areas, theme.SAFETY, "probe in the lane", marker="o")
        for key in ("without", "words"):
            arm = found.arms.get(key, {})
            if "auc" in arm:
                axis.axhline(arm["auc"].value, color=COLOURS[key], linestyle="--", label=arm["title"])
        for of in (found.depth[0], found.depth[len(areas) // 2], found.depth[-1]):
            place = (of["cost"], of["auc"].value)
            axis.annotate(f"block {of['block']}", place, (0, 8), textcoords="offset points", ha="center", fontsize=8.5)
        axis.set(
            xlabel="blocks that a prompt runs through (1: as in the plain model)",
            ylabel="AUC, with its 95 % interval",
            title="Probing earlier in the second lane",
        )
        axis.legend(loc="best", fontsize=8.5)
        return theme.png(figure)


def _unit_square(figure: Any, across: str, up: str) -> Any:
    """Axes from 0 to 1 with the diagonal."""
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color=theme.FAINT, linewidth=1, linestyle=":")
    axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", xlabel=across, ylabel=up)
    return axis
