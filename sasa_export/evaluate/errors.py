"""What can go wrong while a patched model is evaluated."""

from __future__ import annotations

from sasa_export.errors import SasaExportError


class EvaluateError(SasaExportError):
    """A patched model could not be evaluated."""
