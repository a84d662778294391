"""sasa-export: bake SASA, a safety gate, into open vision-language models.

    from sasa_export import Options, patch, verify_directory

Importing this package also registers the patched types, so that `from_pretrained` loads patched directories
without `trust_remote_code`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sasa_export.errors import SasaExportError
from sasa_export.options import Options
from sasa_export.register import register_when_needed

if TYPE_CHECKING:
    from sasa_export.pipeline import patch
    from sasa_export.verify import verify_directory

__all__ = ["Options", "SasaExportError", "patch", "verify_directory"]

register_when_needed()


def __getattr__(name: str) -> Any:
    """Import what does the work when it is asked for: `sasa-export --help` answers without it."""
    if name == "patch":
        from sasa_export.pipeline import patch

        return patch
    if name == "verify_directory":
        from sasa_export.verify import verify_directory

        return verify_directory
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
