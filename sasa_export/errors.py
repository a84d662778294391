"""The errors of sasa-export, one class per stage. Every message says what is wrong, why, and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager


class SasaExportError(Exception):
    """The base class of all errors that sasa-export raises on purpose.

    The message is one line of printable characters. Other characters, for example in file names, are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in message))


class OpenError(SasaExportError):
    """A model could not be opened."""


class CalibrationError(SasaExportError):
    """A probe could not be fitted."""


class TraceError(SasaExportError):
    """A model's layers do not match its family's file."""


class RewriteError(SasaExportError):
    """A graph lacks a node that a rewrite pass needs."""


class EmitError(SasaExportError):
    """A patched model could not be written."""


class VerifyError(SasaExportError):
    """A written model does not do what it should."""


class DataError(SasaExportError):
    """A data set is invalid."""


class LocateError(SasaExportError):
    """Layers could not be located."""


class EvaluateError(SasaExportError):
    """A patched model could not be evaluated."""


@contextmanager
def reworded(kind: type[SasaExportError], message: str) -> Iterator[None]:
    """Raise `kind` for any exception in the block except SasaExportError. {reason} in the message becomes the first
    line of that exception. For code of other libraries, which raise too many types to list."""
    try:
        yield
    except SasaExportError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise kind(message.replace("{reason}", reason)) from None
