"""The AUC of probing at each block of the second lane, against the blocks that the prompt runs through."""

from __future__ import annotations

from sasa_export.research.evaluate.result import Evaluated
from sasa_export.research.theme import Theme, drawing, png


def depth(evaluated: Evaluated, theme: Theme) -> bytes:
    depths = evaluated.depth
    costs = [found.cost for found in depths]
    with drawing(theme, 3.8) as figure:
        axis = figure.subplots()
        axis.fill_between(
            costs, [found.auc.low for found in depths], [found.auc.high for found in depths],
            color=theme.safety, alpha=0.18, linewidth=0,
        )  # fmt: skip
        axis.plot(costs, [found.auc.value for found in depths], "o-", color=theme.safety, label="probe in the lane")
        lines = (("without projection", "without", theme.semantic), ("words alone", "words", theme.harmless))
        for name, key, colour in lines:
            found = evaluated.overall[key].detection if key in evaluated.overall else None
            if found is not None:
                axis.axhline(found.auc.value, color=colour, linewidth=1.2, linestyle="--", label=name)
        for found_at in (depths[0], depths[len(depths) // 2], depths[-1]):
            axis.annotate(f"block {found_at.block}", (found_at.cost, found_at.auc.value), (0, 8),
                          textcoords="offset points", ha="center", fontsize=8.5)  # fmt: skip
        axis.set_xlabel("blocks that a prompt runs through (1: as in the plain model)")
        axis.set_ylabel("AUC, with its 95 % interval")
        axis.set_title("Probing earlier in the second lane")
        axis.legend(loc="best", fontsize=8.5)
        return png(figure)
