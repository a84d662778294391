"""Find where a model perceives danger, where it understands, and where it begins to speak; propose its layers.

The way through it: `locate` in run.py; the proposal's rules in propose.py; the three capabilities in perception.py,
understanding.py and expression.py.
"""

from typing import TYPE_CHECKING, Any

from sasa_export.errors import LocateError
from sasa_export.research.locate.command import LocateOptions

if TYPE_CHECKING:
    from sasa_export.research.locate.run import locate

__all__ = ["LocateError", "LocateOptions", "locate"]


def __getattr__(name: str) -> Any:
    """Import what does the work when it is asked for: `sasa-export --help` answers without it."""
    if name == "locate":
        from sasa_export.research.locate.run import locate

        return locate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
