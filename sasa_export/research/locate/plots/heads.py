"""Every ablated head's score, block by head, with the safety heads framed."""

from __future__ import annotations

from sasa_export.research.locate.heads import HeadScores
from sasa_export.research.theme import Theme, drawing, png


def heads(found: HeadScores, theme: Theme) -> bytes:
    from matplotlib.patches import Rectangle

    blocks, count = found.scores.shape
    with drawing(theme, min(9.0, 1.6 + 0.2 * max(count, 8))) as figure:
        axis = figure.subplots()
        limit = max(abs(float(found.scores.min())), abs(float(found.scores.max())), 1e-9)
        image = axis.imshow(
            found.scores.T,
            aspect="auto",
            origin="lower",
            cmap="PuOr_r",
            vmin=-limit,
            vmax=limit,
            interpolation="nearest",
        )
        for block, head, _ in found.safety_heads():
            corner = (found.blocks.index(block) - 0.5, head - 0.5)
            axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#000000", linewidth=1.8))
        step = max(1, blocks // 12)
        axis.set_xticks(range(0, blocks, step), [str(block) for block in found.blocks[::step]])
        axis.set_yticks(range(0, count, max(1, count // 8)))
        axis.set_xlabel("block (zero-based)")
        axis.set_ylabel("attention head")
        bar = figure.colorbar(image, ax=axis, pad=0.02)
        bar.set_label("degrees: harmful less ordinary")
        bar.outline.set_visible(False)
        axis.set_title("Safety heads are framed" if found.safety_heads() else "No head matters for safety only")
        return png(figure)
