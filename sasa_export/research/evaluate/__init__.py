"""Evaluate: does the gate work, against what, at what price; with every arm on the same prompts, and all intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sasa_export.errors import EvaluateError
from sasa_export.research.evaluate.options import EvaluateOptions

if TYPE_CHECKING:
    from sasa_export.research.evaluate.run import evaluate

__all__ = ["EvaluateError", "EvaluateOptions", "evaluate"]


def __getattr__(name: str) -> Any:
    # Imported on first use: the command line knows the options, and must not load torch to say so.
    if name != "evaluate":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sasa_export.research.evaluate.run import evaluate

    return evaluate
