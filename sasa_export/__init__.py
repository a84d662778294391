"""sasa-export: bake SASA, a safety gate, into open vision-language models.

from sasa_export import Options, patch, verify_directory

patch(Options(model="llava", out="patched"))
checks = verify_directory("patched")
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from sasa_export.errors import SasaExportError
from sasa_export.options import Options

if TYPE_CHECKING:
    from sasa_export.pipeline import patch
    from sasa_export.verify import verify_directory

    __version__: str

__all__ = ["Options", "SasaExportError", "__version__", "patch", "verify_directory"]

MODULES = {"patch": "sasa_export.pipeline", "verify_directory": "sasa_export.verify"}


def __getattr__(name: str) -> Any:
    """Import the modules behind `patch` and `verify_directory` on first use, to keep `sasa-export --help` fast."""
    if name == "__version__":
        return version("sasa-export")
    if name in MODULES:
        return getattr(import_module(MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
