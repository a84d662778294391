"""The pictures of a report, one file each; every function gives the bytes of a PNG."""

from __future__ import annotations

from sasa_export.research.evaluate.plots.bars import bars
from sasa_export.research.evaluate.plots.depth import depth
from sasa_export.research.evaluate.plots.reliability import reliability
from sasa_export.research.evaluate.plots.roc import roc
from sasa_export.research.evaluate.plots.scores import scores
from sasa_export.research.evaluate.result import Evaluated
from sasa_export.research.theme import LIGHT, Theme

__all__ = ["bars", "depth", "pictures", "reliability", "roc", "scores"]


def pictures(evaluated: Evaluated, theme: Theme = LIGHT) -> dict[str, bytes]:
    """All pictures by name."""
    found = {
        "answers": bars(evaluated, theme),
        "roc": roc(evaluated, theme),
        "scores": scores(evaluated, theme),
        "reliability": reliability(evaluated, theme),
    }
    return {**found, "depth": depth(evaluated, theme)} if evaluated.depth else found
