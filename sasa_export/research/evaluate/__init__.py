"""Evaluate: does the gate work, against what, at what price; with every arm on the same prompts, and all intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sasa_export.errors import EvaluateError as EvaluateError
    from sasa_export.research.evaluate.measure import Evaluated as Evaluated
    from sasa_export.research.evaluate.options import EvaluateOptions as EvaluateOptions
    from sasa_export.research.evaluate.run import evaluate as evaluate

HOMES = {
    "EvaluateError": "sasa_export.errors",
    "EvaluateOptions": "sasa_export.research.evaluate.options",
    "Evaluated": "sasa_export.research.evaluate.measure",
    "evaluate": "sasa_export.research.evaluate.run",
}
__all__ = ["EvaluateError", "EvaluateOptions", "Evaluated", "evaluate"]


def __getattr__(name: str) -> Any:
    # Imported on first use, since the command line knows `evaluate` and must not load torch to say so.
    from importlib import import_module

    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)
