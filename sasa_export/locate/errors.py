"""What can go wrong while layers are looked for."""

from __future__ import annotations

from sasa_export.errors import SasaExportError


class LocateError(SasaExportError):
    """The layers of a model could not be located."""
