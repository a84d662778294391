"""Find where a model perceives danger, where it understands, and where it begins to speak; propose its layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sasa_export.errors import LocateError as LocateError
    from sasa_export.research.locate.options import LocateOptions as LocateOptions
    from sasa_export.research.locate.result import Located as Located
    from sasa_export.research.locate.run import locate as locate

HOMES = {"LocateError": "errors", "LocateOptions": "options", "Located": "result", "locate": "run"}
__all__ = ["LocateError", "LocateOptions", "Located", "locate"]


def __getattr__(name: str) -> Any:
    # Imported on first use, since the command line knows `locate` and must not load torch to say so.
    from importlib import import_module

    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
