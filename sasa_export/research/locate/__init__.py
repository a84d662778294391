"""Find where a model perceives danger, where it understands, and where it begins to speak; propose its layers.

The way through it: `locate` in run.py; the proposal's rules in propose.py; the three capabilities in perception.py,
understanding.py and expression.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sasa_export.errors import LocateError
from sasa_export.research.locate.options import LocateOptions

if TYPE_CHECKING:
    from sasa_export.research.locate.page import Located as Located
    from sasa_export.research.locate.run import locate as locate

__all__ = ["LocateError", "LocateOptions", "Located", "locate"]


def __getattr__(name: str) -> Any:
    # On first use, since the command line knows `locate` and must not load torch to say so.
    if name not in ("Located", "locate"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sasa_export.research.locate import run

    return getattr(run, name)
