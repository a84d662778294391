"""What can be wrong with a data set; every message names the file and the record."""

from __future__ import annotations

from sasa_export.errors import SasaExportError


class DataError(SasaExportError):
    """A data set is not what it should be. The message keeps to one line, whatever names a data set holds."""

    def __init__(self, message: str) -> None:
        super().__init__("".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in message))
