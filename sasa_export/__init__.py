"""sasa-export: bake SASA, a safety gate, into open vision-language models.

    from sasa_export import Options, patch, verify

Importing this package also registers the patched types, so that `from_pretrained` loads patched directories
without `trust_remote_code`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sasa_export.errors import SasaExportError
from sasa_export.options import Options
from sasa_export.register import register_when_needed

if TYPE_CHECKING:
    from sasa_export.patch import Patched
    from sasa_export.report import Silent
    from sasa_export.verify import Check

__all__ = ["Options", "SasaExportError", "patch", "verify"]


def patch(options: Options, report: Silent | None = None) -> Patched:
    """Turn a vision-language model into a guarded one; see `sasa_export.patch.patch`."""
    from sasa_export.patch import patch as run

    return run(options, report)


def verify(directory: Path | str, *, device: str = "cpu", only_files: bool = False) -> list[Check]:
    """Check a patched directory: its files, and, unless `only_files`, the model in a fresh process."""
    from sasa_export.verify import check_files, check_manifest, check_model

    directory = Path(directory)
    checks: list[Any] = [*check_files(directory), check_manifest(directory)]
    return checks if only_files else [*checks, *check_model(directory, device=device)]


register_when_needed()
