"""Whether the probabilities are true: what each arm says against what is so, bin by bin."""

from __future__ import annotations

from sasa_export.research.evaluate.result import Evaluated
from sasa_export.research.theme import Theme, drawing, png


def reliability(evaluated: Evaluated, theme: Theme) -> bytes:
    colours = (theme.safety, theme.semantic, theme.harmless, theme.harmful)
    with drawing(theme, 5.0, 5.6) as figure:
        axis = figure.subplots()
        axis.plot([0, 1], [0, 1], color=theme.faint, linewidth=1, linestyle=":")
        most = max(max(found.counts) for found in evaluated.reliability.values())
        for (key, found), colour in zip(evaluated.reliability.items(), colours, strict=False):
            label = f"{evaluated.arm(key).title}, error {found.error:.3f}"
            axis.plot(found.said, found.found, color=colour, linewidth=1.2, label=label)
            axis.scatter(found.said, found.found, [12 + 130 * count / most for count in found.counts], color=colour)
        axis.set_xlim(-0.02, 1.02)
        axis.set_ylim(-0.02, 1.02)
        axis.set_aspect("equal")
        axis.set_xlabel("P(unsafe), mean of a bin")
        axis.set_ylabel("share of harmful prompts in it")
        axis.set_title("Dotted: as it should be; large dots: many prompts")
        axis.legend(loc="upper left", fontsize=8.5)
        return png(figure)
