"""The style of all pictures, with colours that colour-blind readers can tell apart (Okabe and Ito)."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sasa_export.probe.intervals import Estimate

STYLE = Path(__file__).with_suffix(".mplstyle")
WIDTH = 7.0  # inches
RESOLUTION = 130  # dots per inch

# Colours, named by their meaning.
INK, FAINT, THIRD, MISSING = "#1f2328", "#8b949e", "#444c56", "#eef0f2"
HARMFUL, HARMLESS, SAFETY, SEMANTIC = "#d55e00", "#0072b2", "#009e73", "#cc79a7"


@contextmanager
def drawing(height: float, width: float = WIDTH) -> Iterator[Any]:
    """Yield an empty figure, its size in inches, in the common style. Drawing needs no display."""
    with style.context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def png(figure: Any) -> bytes:
    """Return the figure as the bytes of a PNG file. Equal figures give equal bytes."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=RESOLUTION, metadata={"Software": None})
    return out.getvalue()


def band(axis: Any, curve: Sequence[Estimate], colour: str, label: str, **line: Any) -> None:
    """Plot estimates as a line over their indices, with their intervals as a band."""
    axis.plot([point.value for point in curve], color=colour, label=label, **line)
    low, high = [point.low for point in curve], [point.high for point in curve]
    axis.fill_between(range(len(curve)), low, high, color=colour, alpha=0.18, linewidth=0)
