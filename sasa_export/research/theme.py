"""How pictures look: a light and a dark theme, in colours that the colour-blind tell apart (Okabe and Ito)."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

WIDTH = 7.0  # inches
RESOLUTION = 130  # dots per inch


@dataclass(frozen=True)
class Theme:
    """Colours of one theme. `scale` is the colour map of magnitudes."""

    paper: str
    ink: str
    faint: str
    harmful: str
    harmless: str
    safety: str
    semantic: str
    third: str
    missing: str
    scale: str


LIGHT = Theme(
    "#ffffff", "#1f2328", "#8b949e", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#444c56", "#eef0f2", "viridis"
)
DARK = Theme(
    "#14171c", "#e6e8eb", "#7d8590", "#e69f00", "#56b4e9", "#2fc79a", "#e39ac3", "#b6bec8", "#23282f", "viridis"
)


@contextmanager
def drawing(theme: Theme, height: float, width: float = WIDTH) -> Iterator[Any]:
    """A figure of so many inches in the theme's colours; drawn without a display."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "font.size": 10.5,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.faint,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "text.color": theme.ink,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "legend.frameon": False,
        "figure.facecolor": theme.paper,
    }
    with rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def png(figure: Any) -> bytes:
    """The figure as the bytes of a PNG file; equal figures give equal bytes."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=RESOLUTION, metadata={"Software": None})
    return out.getvalue()


def ticks(count: int) -> list[int]:
    """Block numbers that fit under an axis of so many blocks."""
    step = next(step for step in (1, 2, 4, 5, 10, 20, 50) if count / step <= 12)
    return list(range(0, count, step))
