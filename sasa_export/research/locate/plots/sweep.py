"""The sweep as a map: safety layer across, semantic layer up, AUC in each measured cell."""

from __future__ import annotations

import numpy as np

from sasa_export.research.locate.result import Located
from sasa_export.research.theme import Theme, drawing, png

ROOM = 14  # cells a side, above which numbers do not fit into them


def sweep_map(located: Located, theme: Theme) -> bytes:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    pairs = located.sweep.pairs
    across = sorted({safety for safety, _ in pairs})
    up = sorted({semantic for _, semantic in pairs})
    table = np.full((len(up), len(across)), np.nan)
    for (safety, semantic), estimate in pairs.items():
        table[up.index(semantic), across.index(safety)] = estimate.value
    low, high = float(np.nanmin(table)), float(np.nanmax(table))
    if high - low < 0.02:  # a difference that is none must not fill the scale
        low, high = (low + high) / 2 - 0.01, (low + high) / 2 + 0.01
    colours = colormaps[theme.scale].with_extremes(bad=theme.missing)
    with drawing(theme, min(8.0, 1.8 + 0.42 * len(up))) as figure:
        axis = figure.subplots()
        image = axis.imshow(table, origin="lower", aspect="auto", cmap=colours, vmin=low, vmax=high)
        numbers = max(len(across), len(up)) <= ROOM
        for (safety, semantic), estimate in pairs.items():
            place = (across.index(safety), up.index(semantic))
            over = "#000000" if (estimate.value - low) / (high - low) > 0.55 else "#ffffff"
            if numbers:
                axis.text(*place, f"{estimate.value:.3f}"[1:] if estimate.value < 1 else "1", ha="center", va="center",
                          fontsize=9, color=over)  # fmt: skip
            if (safety, semantic) in located.proposal.tied:
                _frame(axis, Rectangle, place, over, 1.2, ":")
        chosen = (located.proposal.safety, located.proposal.semantic)
        _frame(axis, Rectangle, (across.index(chosen[0]), up.index(chosen[1])), theme.harmful, 3.0, "-")
        axis.set_xticks(range(len(across)), [str(layer) for layer in across])
        axis.set_yticks(range(len(up)), [str(layer) for layer in up])
        axis.set_xlabel("safety layer")
        axis.set_ylabel("semantic layer")
        others = "; dotted: within noise of it" if set(located.proposal.tied) - {chosen} else ""
        axis.set_title(f"Chosen: {chosen[0]} and {chosen[1]}{others}")
        for side in ("left", "bottom"):
            axis.spines[side].set_visible(False)
        bar = figure.colorbar(image, ax=axis, pad=0.02)
        bar.set_label("AUC, cross-validated")
        bar.outline.set_visible(False)
        return png(figure)


def _frame(axis: object, shape: type, place: tuple[int, int], colour: str, width: float, line: str) -> None:
    inset = 0.46
    axis.add_patch(  # type: ignore[attr-defined]
        shape(
            (place[0] - inset, place[1] - inset),
            2 * inset,
            2 * inset,
            fill=False,
            edgecolor=colour,
            linewidth=width,
            linestyle=line,
        )
    )
