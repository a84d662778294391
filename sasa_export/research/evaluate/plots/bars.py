"""Attack success rate and over-refusal of every arm, with intervals and targets."""

from __future__ import annotations

from typing import Any

from sasa_export.research.evaluate.result import Evaluated
from sasa_export.research.evaluate.shares import Share
from sasa_export.research.evaluate.targets import ATTACK, OVER_REFUSAL
from sasa_export.research.theme import Theme, drawing, png


def bars(evaluated: Evaluated, theme: Theme) -> bytes:
    titles = [arm.title.replace(" (", "\n(") for arm in evaluated.arms]
    with drawing(theme, 1.2 + 0.52 * len(titles)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        found = [evaluated.overall[arm.key] for arm in evaluated.arms]
        _draw(left, [figures.attack for figures in found], theme.harmful, ATTACK, theme)
        _draw(right, [figures.over_refusal for figures in found], theme.harmless, OVER_REFUSAL, theme)
        left.set_yticks(range(len(titles)), titles)
        left.invert_yaxis()
        left.set_title("Attack success")
        right.set_title("Over-refusal")
        return png(figure)


def _draw(axis: Any, shares: list[Share | None], colour: str, target: float, theme: Theme) -> None:
    for place, found in enumerate(shares):
        if found is None:
            continue
        around = [[100 * (found.value - found.low)], [100 * (found.high - found.value)]]
        axis.barh(place, 100 * found.value, 0.62, color=colour, alpha=0.85)
        axis.errorbar(100 * found.value, place, xerr=around, color=theme.ink, capsize=3, linewidth=1)
        axis.annotate(f"{found.value:.1%}", (100 * found.high, place), (6, 0), textcoords="offset points",
                      va="center", fontsize=9)  # fmt: skip
    axis.axvline(100 * target, color=theme.third, linewidth=1, linestyle=":")
    # Each side has its own scale, or the bars of a small share could not be told apart.
    most = max([100 * found.high for found in shares if found is not None], default=100.0)
    end = next(end for end in (10, 20, 50, 100) if end >= most or end == 100)
    axis.set_xlim(0, 1.2 * end)
    marks = [end * quarter / 4 for quarter in range(5)]
    axis.set_xticks(marks, [f"{mark:g}" for mark in marks])
    axis.set_xlabel(f"% (dotted: target, {target:.0%})")
    axis.tick_params(axis="y", length=0)
