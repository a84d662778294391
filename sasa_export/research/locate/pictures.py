"""The pictures of a locate report. Both are the bytes of a PNG file."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib import colormaps
from matplotlib.patches import Rectangle

from sasa_export.layers.capabilities import Expression
from sasa_export.layers.pairs import Pair
from sasa_export.layers.propose import Proposal
from sasa_export.layers.survey import Evidence
from sasa_export.probe.intervals import Estimate
from sasa_export.research import theme

MOST_NUMBERED = 14  # cells per side of the map, above which the numbers are left out
CHANNELS = {"text": (theme.HARMLESS, "--"), "picture": (theme.HARMFUL, "-.")}  # colour and line style of the curve


def depth(evidence: Evidence, proposal: Proposal) -> bytes:
    """Return a picture of the three capabilities over the depth, one panel each. Lines mark the chosen layers."""
    panels = 2 if evidence.understanding is None else 3
    with theme.drawing(2.25 * panels + 0.5) as figure:
        axes = figure.subplots(panels, 1, sharex=True)
        _perception(axes[0], evidence.perception)
        _mark(axes[0], proposal.safety_blocks, theme.SAFETY)
        if evidence.understanding is not None:
            _understanding(axes[1], evidence.understanding)
            _mark(axes[1], proposal.semantic_blocks, theme.SEMANTIC)
        _expression(axes[-1], evidence.expression)
        chosen = (
            ("safety", proposal.safety_layer, theme.SAFETY),
            ("semantic", proposal.semantic_layer, theme.SEMANTIC),
        )
        for axis in axes:
            for name, layer, colour in chosen:
                label = f"{name} layer {layer}" if axis is axes[0] else None
                axis.axvline(layer, color=colour, linewidth=1.4, linestyle=(0, (4, 2)), label=label)
            axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
        axes[-1].set_xlim(-0.5, len(evidence.expression.readable) - 0.5)
        axes[-1].xaxis.get_major_locator().set_params(integer=True)
        axes[-1].set_xlabel("block (zero-based)")
        return theme.png(figure)


def _perception(axis: Any, curves: Mapping[str, Sequence[Estimate]]) -> None:
    axis.axhline(0.5, color=theme.FAINT, linewidth=0.8, linestyle=":")
    for channel, curve in curves.items():
        if channel != "all":
            colour, line = CHANNELS[channel]
            axis.plot([point.value for point in curve], color=colour, label=channel, linestyle=line, linewidth=1.3)
    label = "all prompts" if len(curves) > 1 else "prompts"
    theme.band(axis, curves["all"], theme.SAFETY, label, linewidth=2)
    axis.set(title="Safety perception", ylabel="AUC")


def _understanding(axis: Any, alignment: Mapping[str, Sequence[Estimate]]) -> None:
    axis.axhline(0.0, color=theme.FAINT, linewidth=0.8, linestyle=":")
    text, image = alignment["text_only"], alignment["image_dominant"]
    theme.band(axis, text, theme.SEMANTIC, "with the request as text", linewidth=2)
    theme.band(axis, image, theme.THIRD, "with the picture alone", linestyle="--", linewidth=1.3)
    axis.set(title="Semantic understanding", ylabel="centred cosine")


def _expression(axis: Any, found: Expression) -> None:
    axis.axhline(found.chance, color=theme.FAINT, linewidth=0.8, linestyle=":", label="a token at random")
    axis.plot(found.readable, color=theme.HARMLESS, linewidth=2, label="readable")
    if found.onset is not None:
        axis.plot([found.onset], [found.readable[found.onset]], marker="o", color=theme.HARMLESS, markersize=7)
    axis.set(ylim=(-0.03, 1.03), title="Linguistic expression", ylabel="share of top 5")


def _mark(axis: Any, blocks: Sequence[int], colour: str) -> None:
    """Draw a bar along the bottom, under the blocks that this panel's evidence points to."""
    for block in blocks:
        axis.axvspan(block - 0.5, block + 0.5, ymin=0, ymax=0.035, color=colour, linewidth=0)


def sweep_map(pairs: Mapping[Pair, Estimate], proposal: Proposal) -> bytes:
    """Return the sweep as a map: safety layer across, semantic layer up, AUC in each measured cell."""
    table = pd.Series({pair: estimate.value for pair, estimate in pairs.items()}).unstack(0)
    low, high = float(table.min(axis=None)), float(table.max(axis=None))
    if high - low < 0.02:  # a negligible difference must not fill the scale
        low, high = (low + high) / 2 - 0.01, (low + high) / 2 + 0.01
    colours = colormaps["viridis"].with_extremes(bad=theme.MISSING)
    with theme.drawing(min(8.0, 1.8 + 0.42 * len(table))) as figure:
        axis = figure.subplots()
        image = axis.imshow(table, colours, origin="lower", aspect="auto", interpolation="nearest", vmin=low, vmax=high)
        for axis_of, layers in ((axis.xaxis, table.columns), (axis.yaxis, table.index)):
            step = -(-len(layers) // MOST_NUMBERED)
            axis_of.set_ticks(range(0, len(layers), step), layers[::step])
        axis.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=axis, pad=0.02, label="AUC, cross-validated")
        bar.outline.set_visible(False)

        def frame(x: int, y: int, **line: Any) -> None:
            axis.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, **line))

        places = {pair: (table.columns.get_loc(pair[0]), table.index.get_loc(pair[1])) for pair in pairs}
        for pair, place in places.items():
            over = "#000000" if (pairs[pair].value - low) / (high - low) > 0.55 else "#ffffff"
            if max(table.shape) <= MOST_NUMBERED:
                axis.text(*place, pairs[pair].short, ha="center", va="center", fontsize=8, color=over)
            if pair in proposal.tied:
                frame(*place, edgecolor=over, linewidth=1.2, linestyle=":")
        frame(*places[proposal.pair], edgecolor=theme.HARMFUL, linewidth=3.0)
        others = "; dotted: within noise of it" if set(proposal.tied) - {proposal.pair} else ""
        axis.set(
            xlabel="safety layer",
            ylabel="semantic layer",
            title=f"Chosen: {proposal.safety_layer} and {proposal.semantic_layer}{others}",
        )
        return theme.png(figure)
