"""How pictures look, in colours that the colour-blind tell apart (Okabe and Ito)."""

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
    """Colours by what they stand for. `scale` is the colour map of magnitudes."""

    paper: str = "#ffffff"
    ink: str = "#1f2328"
    faint: str = "#8b949e"
    harmful: str = "#d55e00"
    harmless: str = "#0072b2"
    safety: str = "#009e73"
    semantic: str = "#cc79a7"
    third: str = "#444c56"
    missing: str = "#eef0f2"
    scale: str = "viridis"


LIGHT = Theme()


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
