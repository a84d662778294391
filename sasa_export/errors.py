"""What can go wrong, by the stage it goes wrong in; every message says what, why, and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager


class SasaExportError(Exception):
    """The base of all errors that sasa-export raises on purpose.

    The message keeps to one line of printable letters, whatever names of files and records it holds.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in message))


class OpenError(SasaExportError):
    """A model could not be opened."""


class CalibrationError(SasaExportError):
    """A probe could not be fitted."""


class TraceError(SasaExportError):
    """A model's layers are not what its family says."""


class RewriteError(SasaExportError):
    """A graph does not have what a rewrite pass needs."""


class EmitError(SasaExportError):
    """A patched model could not be written."""


class VerifyError(SasaExportError):
    """A written model does not do what it should."""


class DataError(SasaExportError):
    """A data set is not what it should be."""


class LocateError(SasaExportError):
    """Layers could not be located."""


class EvaluateError(SasaExportError):
    """A patched model could not be evaluated."""


@contextmanager
def reworded(kind: type[SasaExportError], message: str) -> Iterator[None]:
    """Raise `kind` for whatever is raised within, but for our errors, its first line in the place of {reason} in the
    message. For code of others, which fails in as many ways as there are files."""
    try:
        yield
    except SasaExportError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise kind(message.replace("{reason}", reason)) from None
