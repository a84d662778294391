"""What can be wrong with a data set; every message names the file and the record."""

from __future__ import annotations

from sasa_export.errors import SasaExportError


class DataError(SasaExportError):
    """A data set is not what it should be."""
