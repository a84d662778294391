"""t-SNE pictures side by side, one a block."""

from __future__ import annotations

from sasa_export.research.locate.result import Located
from sasa_export.research.theme import WIDTH, Theme, drawing, png

COLUMNS = 4
MARKERS = {"text": "o", "picture": "^"}


def scatter(located: Located, theme: Theme) -> bytes:
    blocks = sorted(located.tsne)
    rows = -(-len(blocks) // COLUMNS)
    proposal = located.proposal
    names = {
        proposal.safety: ("safety layer", theme.safety),
        proposal.semantic: ("semantic layer", theme.semantic),
    }
    kinds = sorted(set(located.drawn))
    with drawing(theme, rows * WIDTH / COLUMNS * 1.08 + 0.4) as figure:
        axes = figure.subplots(rows, COLUMNS, squeeze=False)
        for axis in axes.flat[len(blocks) :]:
            axis.set_visible(False)
        handles = {}
        for axis, block in zip(axes.flat, blocks, strict=False):
            points = located.tsne[block]  # (prompts, 2)
            for label, channel in kinds:
                chosen = [row for row, kind in enumerate(located.drawn) if kind == (label, channel)]
                handles[label, channel] = axis.scatter(
                    points[chosen, 0],
                    points[chosen, 1],
                    s=11,
                    marker=MARKERS.get(channel, "s"),
                    color=theme.harmful if label else theme.harmless,
                    alpha=0.75,
                    linewidths=0,
                )
            word, colour = names.get(block, ("", theme.faint))
            axis.set_title(
                f"block {block}" + (f": {word}" if word else ""), fontsize=9, color=colour if word else theme.ink
            )
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_visible(True)
                spine.set_color(colour)
                spine.set_linewidth(2.0 if word else 0.8)
        text = [f"{'harmful' if label else 'harmless'}, {channel}" for label, channel in handles]
        figure.legend(
            list(handles.values()), text, loc="outside lower center", ncols=len(handles), fontsize=9, markerscale=1.6
        )
        return png(figure)
