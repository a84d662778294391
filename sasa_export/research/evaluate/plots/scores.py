"""How the scores of harmful and harmless prompts lie, for every arm that detects."""

from __future__ import annotations

import numpy as np

from sasa_export.research.evaluate.result import Evaluated
from sasa_export.research.theme import Theme, drawing, png

BINS = np.linspace(0, 1, 41)
BORDERLINE = "borderline"  # the category or attack of harmless prompts that are made to look harmful


def scores(evaluated: Evaluated, theme: Theme) -> bytes:
    arms = evaluated.scored()
    labels = evaluated.labels
    near = np.array([BORDERLINE in f"{prompt.attack} {prompt.category}" for prompt in evaluated.prompts])
    kinds = [
        ("harmless", theme.harmless, (labels == 0) & ~near),
        ("harmless, borderline", theme.safety, (labels == 0) & near),
        ("harmful", theme.harmful, labels == 1),
    ]
    with drawing(theme, 0.9 + 1.6 * len(arms)) as figure:
        axes = np.atleast_1d(figure.subplots(len(arms), 1, sharex=True))
        for axis, arm in zip(axes, arms, strict=True):
            assert arm.scores is not None  # `scored` gives those that have some
            for name, colour, rows in kinds:
                if rows.any():
                    weights = np.full(int(rows.sum()), 100 / rows.sum())
                    axis.hist(arm.scores[rows], BINS, weights=weights, color=colour, alpha=0.45, label=name)
                    axis.hist(arm.scores[rows], BINS, weights=weights, color=colour, histtype="step", linewidth=1.2)
            if arm.threshold is not None:
                axis.axvline(arm.threshold, color=theme.ink, linewidth=1.2, linestyle="--")
            axis.set_title(arm.title, fontsize=10)
            axis.set_ylabel("% of kind")
            axis.set_xlim(0, 1)
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=9)
        axes[-1].set_xlabel("P(unsafe); dashed: the threshold of the calibration")
        return png(figure)
