"""Write beside, then rename: an output directory is whole or not there."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sasa_export.errors import EmitError


@contextmanager
def staged(out: Path, *, force: bool, needed_bytes: int = 0) -> Iterator[Path]:
    """A fresh directory beside `out`, which takes its place when the block ends well and vanishes otherwise.

    Raises EmitError where `out` is taken, not writable, or the disk too small.
    """
    out = out.resolve()
    check_free(out, force=force)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < needed_bytes:
            raise EmitError(
                f"{out.parent} has {free / 1e9:.2f} GB free and the patched model needs {needed_bytes / 1e9:.2f} GB. "
                "Free some space, choose another --out, or use --link on the same disk as the model."
            )
        _sweep(out)
        staging = out.parent / f".{out.name}.partial-{os.getpid()}"
        staging.mkdir()
    except OSError as error:
        raise _explained(error, out) from None
    try:
        yield staging
        check_free(out, force=force)
        _replace(staging, out)
    except OSError as error:
        raise _explained(error, out) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_apart(out: Path, source: Path) -> None:
    """Raise EmitError where writing `out` would remove the model that it is made from."""
    out, source = out.resolve(), source.resolve()
    if out == source or out in source.parents:
        raise EmitError(f"{out} holds the source model itself, and writing it would remove that. Give another --out.")


def check_free(out: Path, *, force: bool) -> None:
    if out.is_file():
        raise EmitError(f"{out} is a file. Give a directory as --out.")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise EmitError(f"{out} is not empty. Give another --out, or --force to replace it.")


def _replace(staging: Path, out: Path) -> None:
    aside = staging.with_name(staging.name.replace(".partial-", ".replaced-"))
    if out.exists():
        os.rename(out, aside)
    try:
        os.rename(staging, out)
    except BaseException:  # an interruption too must leave the old output in place
        if aside.exists() and not out.exists():
            os.rename(aside, out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _sweep(out: Path) -> None:
    """Remove what a killed run has left, and put back an output that it had moved aside."""
    for left in out.parent.glob(f".{out.name}.*-*"):
        kind, _, process = left.name.removeprefix(f".{out.name}.").partition("-")
        if kind not in ("partial", "replaced") or not process.isdigit() or _another(int(process)):
            continue
        if kind == "replaced" and not out.exists():
            os.rename(left, out)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _another(process: int) -> bool:
    """Does this number belong to another process that runs? Our own was somebody else's before."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _explained(error: OSError, out: Path) -> EmitError:
    if error.errno == errno.ENOSPC:
        return EmitError(f"the disk is full: {out} was not written, and nothing is left of it. Free some space.")
    return EmitError(f"{out} could not be written ({error.strerror or error}). Nothing is left of it.")
