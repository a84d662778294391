"""Markdown tables of figures."""

from __future__ import annotations

from collections.abc import Sequence

from sasa_export.research.evaluate.shares import Interval, Share


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar in a cell is escaped."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def percent(found: Share | None, *, short: bool = False) -> str:
    """A share with its interval; `short` leaves the interval out."""
    if found is None:
        return ""
    return f"{found.value:.1%}" if short else f"{found.value:.1%} ({found.low:.1%} to {found.high:.1%})"


def figure(found: Interval | None, *, short: bool = False) -> str:
    """A figure with its interval; `short` leaves the interval out."""
    if found is None:
        return ""
    return f"{found.value:.3f}" if short else f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"
