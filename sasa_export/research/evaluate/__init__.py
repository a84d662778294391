"""Evaluate: does the gate work, against what, at what price; with every arm on the same prompts, and all intervals."""

from typing import TYPE_CHECKING, Any

from sasa_export.errors import EvaluateError
from sasa_export.research.evaluate.command import EvaluateOptions

if TYPE_CHECKING:
    from sasa_export.research.evaluate.run import evaluate

__all__ = ["EvaluateError", "EvaluateOptions", "evaluate"]


def __getattr__(name: str) -> Any:
    """Import what does the work when it is asked for: `sasa-export --help` answers without it."""
    if name == "evaluate":
        from sasa_export.research.evaluate.run import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
