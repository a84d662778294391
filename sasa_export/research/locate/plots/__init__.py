"""The pictures of a report, one file each; every function gives the bytes of a PNG."""

from __future__ import annotations

from sasa_export.research.locate.plots.depth import depth
from sasa_export.research.locate.plots.heads import heads
from sasa_export.research.locate.plots.scatter import scatter
from sasa_export.research.locate.plots.sweep import sweep_map
from sasa_export.research.theme import DARK, LIGHT, Theme

__all__ = ["DARK", "LIGHT", "Theme", "depth", "heads", "scatter", "sweep_map"]
