"""The pictures of a report; every function gives the bytes of a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sasa_export.research.locate.heads import HeadScores
from sasa_export.research.locate.interval import Estimate
from sasa_export.research.locate.pairs import Pair
from sasa_export.research.theme import LIGHT, WIDTH, drawing, png, ticks

if TYPE_CHECKING:
    from sasa_export.research.locate.page import Located

MOST_NUMBERED = 14  # cells a side, above which numbers do not fit into them
COLUMNS = 4  # of t-SNE pictures
MARKERS = {"text": "o", "picture": "^"}


def pictures(located: Located) -> dict[str, bytes]:
    """The PNG files by name."""
    found = {"depth": depth(located), "sweep": sweep_map(located), "tsne": scatter(located)}
    return found if located.heads is None else {**found, "heads": heads(located.heads)}


def depth(located: Located) -> bytes:
    """The three capabilities over the depth, one above the other, with the chosen layers through all."""
    evidence, proposal = located.evidence, located.proposal
    blocks = len(evidence.expression.readable)
    panels = 2 if evidence.understanding is None else 3
    with drawing(LIGHT, 2.25 * panels + 0.5) as figure:
        axes = figure.subplots(panels, 1, sharex=True)
        _perception(axes[0], evidence.perception, proposal.safety_blocks)
        if evidence.understanding is not None:
            _understanding(axes[1], located)
        _expression(axes[-1], located)
        for axis in axes:
            axis.axvline(proposal.safety_layer, color=LIGHT.safety, linewidth=1.4, linestyle=(0, (4, 2)))
            axis.axvline(proposal.semantic_layer, color=LIGHT.semantic, linewidth=1.4, linestyle=(0, (4, 2)))
            axis.set_xlim(-0.5, blocks - 0.5)
        # Names above the upper panel, one higher than the other, away from the panel's ends.
        left = proposal.safety_layer < blocks / 4
        _name(axes[0], "safety layer", proposal.safety_layer, LIGHT.safety, 4, "left" if left else "right")
        right = proposal.semantic_layer > blocks * 3 / 4
        _name(axes[0], "semantic layer", proposal.semantic_layer, LIGHT.semantic, 17, "right" if right else "left")
        axes[-1].set_xticks(ticks(blocks))
        axes[-1].set_xlabel("block (zero-based)")
        return png(figure)


def _perception(axis: Any, curves: Mapping[str, Sequence[Estimate]], marked: Sequence[int]) -> None:
    _mark(axis, marked, LIGHT.safety)
    axis.axhline(0.5, color=LIGHT.faint, linewidth=0.8, linestyle=":")
    styles = {"text": (LIGHT.harmless, "--"), "picture": (LIGHT.harmful, "-.")}
    for channel, curve in curves.items():
        if channel != "all":
            colour, line = styles.get(channel, (LIGHT.third, ":"))
            axis.plot([point.value for point in curve], color=colour, label=channel, linestyle=line, linewidth=1.3)
    _curve(axis, curves["all"], LIGHT.safety, "all prompts" if len(curves) > 1 else "prompts")
    axis.set_title("Safety perception", pad=32)
    axis.set_ylabel("AUC")
    axis.legend(loc="best", fontsize=9, ncols=3)


def _understanding(axis: Any, located: Located) -> None:
    alignment = located.evidence.understanding
    assert alignment is not None
    _mark(axis, located.proposal.semantic_blocks, LIGHT.semantic)
    axis.axhline(0.0, color=LIGHT.faint, linewidth=0.8, linestyle=":")
    _curve(axis, alignment.text_only, LIGHT.semantic, "with the request as text")
    _curve(axis, alignment.image_dominant, LIGHT.third, "with the picture alone", linestyle="--", linewidth=1.3)
    axis.set_title("Semantic understanding")
    axis.set_ylabel("centred cosine")
    axis.legend(loc="best", fontsize=9)


def _expression(axis: Any, located: Located) -> None:
    found = located.evidence.expression
    axis.axhline(found.chance, color=LIGHT.faint, linewidth=0.8, linestyle=":")
    axis.plot(found.readable, color=LIGHT.harmless, linewidth=2, label="readable")
    axis.plot(found.already_final, color=LIGHT.third, linewidth=1.3, linestyle="--", label="as after the last block")
    place = {"xytext": (2, 3), "textcoords": "offset points"}
    axis.annotate("a token at random", (0, found.chance), **place, fontsize=8, color=LIGHT.faint)
    if found.onset is not None:
        axis.plot([found.onset], [found.readable[found.onset]], marker="o", color=LIGHT.harmless, markersize=7)
    axis.set_ylim(-0.03, 1.03)
    axis.set_title("Linguistic expression")
    axis.set_ylabel("share of top 5")
    axis.legend(loc="best", fontsize=9)


def _curve(axis: Any, curve: Sequence[Estimate], colour: str, label: str, **line: Any) -> None:
    """A line over the blocks, with its interval as a band."""
    axis.plot([point.value for point in curve], color=colour, label=label, **{"linewidth": 2, **line})
    low, high = [point.low for point in curve], [point.high for point in curve]
    axis.fill_between(range(len(curve)), low, high, color=colour, alpha=0.18, linewidth=0)


def _mark(axis: Any, blocks: Sequence[int], colour: str) -> None:
    """A bar along the bottom under the blocks that the evidence of this panel points to."""
    for block in blocks:
        axis.axvspan(block - 0.5, block + 0.5, ymin=0, ymax=0.035, color=colour, linewidth=0)


def _name(axis: Any, name: str, layer: int, colour: str, height: int, side: str) -> None:
    place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    place["xytext"] = (-3 if side == "right" else 3, height)
    axis.annotate(f"{name} {layer}", (layer, 1.0), **place, ha=side, fontsize=9.5, fontweight="bold", color=colour)


def heads(found: HeadScores) -> bytes:
    """Every ablated head's score, block by head, with the safety heads framed."""
    scores = (found.degrees_harmful - found.degrees_ordinary).T  # (heads, blocks)
    count, blocks = scores.shape
    with drawing(LIGHT, min(9.0, 1.6 + 0.2 * max(count, 8))) as figure:
        axis = figure.subplots()
        limit = max(float(np.abs(scores).max()), 1e-9)
        shades = {"cmap": "PuOr_r", "vmin": -limit, "vmax": limit}
        image = axis.imshow(scores, aspect="auto", origin="lower", interpolation="nearest", **shades)
        for head in found.safety_heads:
            _frame(axis, found.blocks.index(head.block), head.head, 1.0, "#000000", linewidth=1.8)
        step = max(1, blocks // 12)
        axis.set_xticks(range(0, blocks, step), [str(block) for block in found.blocks[::step]])
        axis.set_yticks(range(0, count, max(1, count // 8)))
        axis.set_xlabel("block (zero-based)")
        axis.set_ylabel("attention head")
        _colour_bar(figure, axis, image, "degrees: harmful less ordinary")
        axis.set_title("Safety heads are framed" if found.safety_heads else "No head matters for safety only")
        return png(figure)


def sweep_map(located: Located) -> bytes:
    """The sweep as a map: safety layer across, semantic layer up, AUC in each measured cell."""
    from matplotlib import colormaps

    table = pd.Series({pair: estimate.value for pair, estimate in located.evidence.sweep.pairs.items()}).unstack(0)
    low, high = float(table.min(axis=None)), float(table.max(axis=None))
    if high - low < 0.02:  # a difference that is none must not fill the scale
        low, high = (low + high) / 2 - 0.01, (low + high) / 2 + 0.01
    colours = colormaps[LIGHT.scale].with_extremes(bad=LIGHT.missing)
    proposal = located.proposal
    with drawing(LIGHT, min(8.0, 1.8 + 0.42 * len(table))) as figure:
        axis = figure.subplots()
        image = axis.imshow(table.to_numpy(), origin="lower", aspect="auto", cmap=colours, vmin=low, vmax=high)
        for pair, estimate in located.evidence.sweep.pairs.items():
            place = _cell(table, pair)
            over = "#000000" if (estimate.value - low) / (high - low) > 0.55 else "#ffffff"
            if max(table.shape) <= MOST_NUMBERED:
                number = f"{estimate.value:.3f}"[1:] if estimate.value < 1 else "1"
                axis.text(*place, number, ha="center", va="center", fontsize=9, color=over)
            if pair in proposal.tied:
                _frame(axis, *place, 0.92, over, linewidth=1.2, linestyle=":")
        _frame(axis, *_cell(table, proposal.pair), 0.92, LIGHT.harmful, linewidth=3.0)
        axis.set_xticks(range(len(table.columns)), [str(layer) for layer in table.columns])
        axis.set_yticks(range(len(table)), [str(layer) for layer in table.index])
        axis.set_xlabel("safety layer")
        axis.set_ylabel("semantic layer")
        others = "; dotted: within noise of it" if set(proposal.tied) - {proposal.pair} else ""
        axis.set_title(f"Chosen: {proposal.safety_layer} and {proposal.semantic_layer}{others}")
        axis.spines[["left", "bottom"]].set_visible(False)
        _colour_bar(figure, axis, image, "AUC, cross-validated")
        return png(figure)


def _cell(table: pd.DataFrame, pair: Pair) -> tuple[int, int]:
    return table.columns.get_loc(pair[0]), table.index.get_loc(pair[1])


def _frame(axis: Any, across: int, up: int, size: float, colour: str, **line: Any) -> None:
    """A frame around a cell of a map."""
    from matplotlib.patches import Rectangle

    axis.add_patch(Rectangle((across - size / 2, up - size / 2), size, size, fill=False, edgecolor=colour, **line))


def _colour_bar(figure: Any, axis: Any, image: Any, label: str) -> None:
    bar = figure.colorbar(image, ax=axis, pad=0.02)
    bar.set_label(label)
    bar.outline.set_visible(False)


def scatter(located: Located) -> bytes:
    """t-SNE pictures side by side, one a block."""
    proposal = located.proposal
    names = {
        proposal.safety_layer: (": safety layer", LIGHT.safety),
        proposal.semantic_layer: (": semantic layer", LIGHT.semantic),
    }
    kinds = sorted({(prompt.label, prompt.channel) for prompt in located.drawn})
    rows = -(-len(located.tsne) // COLUMNS)
    with drawing(LIGHT, rows * WIDTH / COLUMNS * 1.08 + 0.4) as figure:
        axes = figure.subplots(rows, COLUMNS, squeeze=False)
        for axis in axes.flat[len(located.tsne) :]:
            axis.set_visible(False)
        for axis, (block, found) in zip(axes.flat, sorted(located.tsne.items()), strict=False):
            for label, channel in kinds:
                chosen = [(prompt.label, prompt.channel) == (label, channel) for prompt in located.drawn]
                axis.scatter(
                    *found[chosen].T, s=11, marker=MARKERS.get(channel, "s"), alpha=0.75, linewidths=0,
                    color=LIGHT.harmful if label else LIGHT.harmless,
                    label=f"{'harmful' if label else 'harmless'}, {channel}",
                )  # fmt: skip
            name, colour = names.get(block, ("", LIGHT.faint))
            axis.set_title(f"block {block}{name}", fontsize=9, color=colour if name else LIGHT.ink)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set(visible=True, color=colour, linewidth=2.0 if name else 0.8)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        place = {"loc": "outside lower center", "ncols": len(labels)}
        figure.legend(handles, labels, fontsize=9, markerscale=1.6, **place)
        return png(figure)
