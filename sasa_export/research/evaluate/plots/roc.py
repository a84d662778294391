"""The ROC curve of every arm that detects, with the point at its threshold."""

from __future__ import annotations

from sasa_export.research.evaluate.result import Evaluated
from sasa_export.research.theme import Theme, drawing, png


def roc(evaluated: Evaluated, theme: Theme) -> bytes:
    from sklearn.metrics import roc_curve

    labels = evaluated.labels
    colours = (theme.safety, theme.semantic, theme.harmless, theme.harmful)
    with drawing(theme, 5.2, 5.6) as figure:
        axis = figure.subplots()
        axis.plot([0, 1], [0, 1], color=theme.faint, linewidth=1, linestyle=":")
        for arm, colour in zip(evaluated.scored(), colours, strict=False):
            wrong, caught, _ = roc_curve(labels, arm.scores, drop_intermediate=False)
            found = evaluated.overall[arm.key]
            area = "" if found.detection is None else f", AUC {found.detection.auc.value:.3f}"
            axis.plot(wrong, caught, color=colour, linewidth=1.8, label=f"{arm.title}{area}")
            if found.caught is not None and found.false_positives is not None:
                axis.plot(found.false_positives.value, found.caught.value, "o", color=colour, markersize=7)
        axis.set_xlim(-0.01, 1.01)
        axis.set_ylim(-0.01, 1.01)
        axis.set_aspect("equal")
        axis.set_xlabel("share of harmless prompts flagged")
        axis.set_ylabel("share of harmful prompts flagged")
        axis.set_title("Large dots: the threshold of the calibration")
        axis.legend(loc="lower right", fontsize=8.5)
        return png(figure)
