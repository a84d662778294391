"""The pictures of an evaluation's report. Every picture is the bytes of a PNG file."""

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import roc_curve

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
    """Return all pictures by file name. They show the arms that detect, which have an AUC."""
    detecting = [key for key, arm in found.arms.items() if "auc" in arm]
    return {"roc.png": roc(found, detecting), "scores.png": scores(found, detecting)}


def roc(found: Evaluated, detecting: Sequence[str]) -> bytes:
    """Return the ROC curves of the arms, each with a dot at its threshold."""
    with theme.drawing(5.2, 5.6) as figure:
        axis = figure.subplots()
        axis.plot([0, 1], [0, 1], color=theme.FAINT, linewidth=1, linestyle=":")
        for key in detecting:
            arm, scored = found.arms[key], found.answers[f"{key}_unsafe_probability"]
            wrong, caught, _ = roc_curve(found.answers.label, scored, drop_intermediate=False)
            label = f"{arm['title']}, AUC {arm['auc'].short}"
            axis.plot(wrong, caught, color=COLOURS[key], linewidth=1.8, label=label)
            if "caught" in arm:
                axis.plot(arm["false_positives"].value, arm["caught"].value, "o", color=COLOURS[key], markersize=7)
        axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        axis.set(xlabel="share of harmless prompts flagged", ylabel="share of harmful prompts flagged")
        axis.set_title("Large dots: the threshold of the calibration")
        axis.legend(loc="lower right", fontsize=8.5)
        return theme.png(figure)


def scores(found: Evaluated, detecting: Sequence[str]) -> bytes:
    """Return histograms of P(unsafe) of harmful and harmless prompts, one panel per arm."""
    asked = found.answers
    near = (asked.attack + asked.category).str.contains(BORDERLINE)
    kinds = {
        "harmless": (theme.HARMLESS, (asked.label == 0) & ~near),
        "harmless, borderline": (theme.SAFETY, (asked.label == 0) & near),
        "harmful": (theme.HARMFUL, asked.label == 1),
    }
    with theme.drawing(0.9 + 1.6 * len(detecting)) as figure:
        axes = figure.subplots(len(detecting), 1, sharex=True)
        for axis, key in zip(axes, detecting, strict=True):
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
