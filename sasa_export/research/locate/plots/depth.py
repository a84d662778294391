"""The three capabilities over the depth of the decoder, one above the other, with the chosen layers through all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sasa_export.research.locate.interval import Estimate
from sasa_export.research.locate.result import Located
from sasa_export.research.theme import Theme, drawing, png, ticks


def depth(located: Located, theme: Theme) -> bytes:
    count = located.subject.blocks
    panels = 3 if located.alignment is not None else 2
    with drawing(theme, 2.25 * panels + 0.5) as figure:
        axes = figure.subplots(panels, 1, sharex=True)
        _separability(axes[0], located, theme)
        if located.alignment is not None:
            _alignment(axes[1], located, theme)
        _expression(axes[-1], located, theme)
        for axis in axes:
            _layers(axis, located, theme)
            axis.set_xlim(-0.5, count - 0.5)
        _name_layers(axes[0], located, theme)
        axes[-1].set_xticks(ticks(count))
        axes[-1].set_xlabel("block (zero-based)")
        return png(figure)


def _separability(axis: Any, located: Located, theme: Theme) -> None:
    found = located.separability
    _mark(axis, located.proposal.safety_blocks, theme.safety)
    axis.axhline(0.5, color=theme.faint, linewidth=0.8, linestyle=":")
    styles = {"text": (theme.harmless, "--"), "picture": (theme.harmful, "-.")}
    for channel, curve in found.channels.items():
        colour, line = styles.get(channel, (theme.third, ":"))
        _curve(axis, curve, colour, channel, linestyle=line, linewidth=1.3, band=False)
    _curve(axis, found.overall, theme.safety, "all prompts" if found.channels else "prompts")
    axis.set_title("Safety perception", pad=32)
    axis.set_ylabel("AUC")
    axis.legend(loc="best", fontsize=9, ncols=3)


def _alignment(axis: Any, located: Located, theme: Theme) -> None:
    found = located.alignment
    assert found is not None
    _mark(axis, located.proposal.semantic_blocks, theme.semantic)
    axis.axhline(0.0, color=theme.faint, linewidth=0.8, linestyle=":")
    _curve(axis, found.text, theme.semantic, "with the request as text")
    _curve(axis, found.image, theme.third, "with the picture alone", linestyle="--", linewidth=1.3)
    axis.set_title("Semantic understanding")
    axis.set_ylabel("centred cosine")
    axis.legend(loc="best", fontsize=9)


def _expression(axis: Any, located: Located, theme: Theme) -> None:
    found = located.expression
    blocks = range(len(found.readable))
    axis.axhline(found.chance, color=theme.faint, linewidth=0.8, linestyle=":")
    axis.plot(blocks, found.readable, color=theme.harmless, linewidth=2, label="readable")
    axis.plot(blocks, found.settled, color=theme.third, linewidth=1.3, linestyle="--", label="as after the last block")
    axis.annotate(
        "a token at random", (0, found.chance), xytext=(2, 3), textcoords="offset points", fontsize=8, color=theme.faint
    )
    onset = found.onset()
    if onset is not None:
        axis.plot([onset], [found.readable[onset]], marker="o", color=theme.harmless, markersize=7)
    axis.set_ylim(-0.03, 1.03)
    axis.set_title("Linguistic expression")
    axis.set_ylabel("share of top 5")
    axis.legend(loc="best", fontsize=9)


def _curve(
    axis: Any,
    curve: Sequence[Estimate],
    colour: str,
    label: str,
    *,
    linestyle: str = "-",
    linewidth: float = 2,
    band: bool = True,
) -> None:
    blocks = range(len(curve))
    axis.plot(
        blocks, [point.value for point in curve], color=colour, label=label, linestyle=linestyle, linewidth=linewidth
    )
    if band:
        low, high = [point.low for point in curve], [point.high for point in curve]
        axis.fill_between(blocks, low, high, color=colour, alpha=0.18, linewidth=0)


def _mark(axis: Any, blocks: Sequence[int], colour: str) -> None:
    """A bar along the bottom under the blocks that the evidence of this panel points to."""
    for block in blocks:
        axis.axvspan(block - 0.5, block + 0.5, ymin=0, ymax=0.035, color=colour, linewidth=0)


def _layers(axis: Any, located: Located, theme: Theme) -> None:
    axis.axvline(located.proposal.safety, color=theme.safety, linewidth=1.4, linestyle=(0, (4, 2)))
    axis.axvline(located.proposal.semantic, color=theme.semantic, linewidth=1.4, linestyle=(0, (4, 2)))


def _name_layers(axis: Any, located: Located, theme: Theme) -> None:
    """Names above the upper panel, one higher than the other, away from the panel's ends."""
    count = located.subject.blocks
    safety, semantic = located.proposal.safety, located.proposal.semantic
    for layer, name, colour, height, side in (
        (safety, f"safety layer {safety}", theme.safety, 4, "left" if safety < count / 4 else "right"),
        (semantic, f"semantic layer {semantic}", theme.semantic, 17, "right" if semantic > count * 3 / 4 else "left"),
    ):
        axis.annotate(
            name,
            (layer, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(-3 if side == "right" else 3, height),
            textcoords="offset points",
            ha=side,
            fontsize=9.5,
            fontweight="bold",
            color=colour,
        )
