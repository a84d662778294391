"""Write beside, then change places: an output directory is whole or not there, and one run at a time writes it.

Beside an output `out` there may lie, for as long as a run lasts: `.out.lock`, `.out.partial-N` (what is being written)
and, where the file system cannot exchange two directories, `.out.replaced-N` (what is being replaced). A run that
is killed leaves them; the next one clears them away.
"""

from __future__ import annotations

import contextvars
import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sasa_export.errors import EmitError

SWAP = 2  # RENAME_EXCHANGE and RENAME_SWAP are the same number
HERE = -100  # AT_FDCWD of Linux: relative paths start at the working directory

_claimed: contextvars.ContextVar[frozenset[Path]] = contextvars.ContextVar("claimed", default=frozenset())


@contextmanager
def staged(out: Path, *, force: bool, needed_bytes: int = 0) -> Iterator[Path]:
    """A fresh directory beside `out`, which takes its place when the block ends well and vanishes otherwise.

    `out` is claimed for as long as the block runs.

    Raises EmitError where `out` is taken, not writable, or the disk too small or full, then or within the block.
    """
    out = resolved(out)
    check_free(out, force=force)
    with claimed(out):
        check_free(out, force=force)  # again, since a killed run's claim may have had an output to put back
        try:
            check_disk(out, needed_bytes)
            staging = out.parent / f".{out.name}.partial-{os.getpid()}"
            staging.mkdir()
        except OSError as error:
            raise _explained(error, out) from None
        try:
            yield staging
            check_free(out, force=force)
            _replace(staging, out)
        except Exception as error:
            if isinstance(error, OSError) or _is_full(error):
                raise _explained(error, out) from None
            raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def claimed(out: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other runs from writing `out` while the block runs, and clear away what a killed one left beside it.

    The claim is a lock that the system drops with its process, so that a killed run leaves none. Within the block,
    `claimed` and `staged` may be used again for the same `out`.

    Args:
        out: the output directory, there or not; missing directories above it are made.
        wait: wait for the other run instead of raising EmitError.
    """
    from filelock import FileLock, Timeout

    out = resolved(out)
    if out in _claimed.get():
        yield
        return
    lock = FileLock(out.parent / f".{out.name}.lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise EmitError(f"another run is writing {out}. Wait until it is done, or give another --out.") from None
    except OSError as error:
        raise _explained(error, out) from None
    token = _claimed.set(_claimed.get() | {out})
    try:
        try:
            _sweep(out)
        except OSError as error:
            raise _explained(error, out) from None
        yield
    finally:
        _claimed.reset(token)
        # Still locked, so that nobody can hold it: whoever waits for it sees that it is gone, and makes a new one.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def check_apart(out: Path, *inputs: Path | None) -> None:
    """Raise EmitError where writing `out` would remove a model or a file that it is made from."""
    out = resolved(out)
    for path in inputs:
        if path is not None and out in (resolved(path), *resolved(path).parents):
            what = "the source model itself" if path.is_dir() else str(path)
            raise EmitError(f"{out} holds {what}, and writing it would remove that. Give another --out.")


def check_free(out: Path, *, force: bool) -> None:
    """Raise EmitError where `out` cannot be written: a file, not empty (unless `force`), or a place of others."""
    out = resolved(out)
    try:
        if out.is_file():
            raise EmitError(f"{out} is a file. Give a directory as --out.")
        if out.is_dir() and any(out.iterdir()):
            if not force:
                raise EmitError(f"{out} is not empty. Give another --out, or --force to replace it.")
            here, home = Path.cwd(), Path(os.path.expanduser("~"))
            if out in (here, *here.parents, home, *home.parents):
                raise EmitError(f"{out} is your home or working directory, or above it. Give another --out.")
        if os.path.ismount(out):
            raise EmitError(f"{out} is a mount point, which cannot be replaced whole. Give a directory below it.")
    except OSError as error:
        raise _explained(error, out) from None


def check_disk(out: Path, needed_bytes: int) -> None:
    """Raise EmitError where the disk has not so much space left for `out`."""
    place = resolved(out).parent
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise _explained(error, out) from None
    if free < needed_bytes:
        raise EmitError(
            f"{place} has {free / 1e9:.2f} GB free and the patched model needs {needed_bytes / 1e9:.2f} GB. Free some "
            "space, choose another --out, or use --link on the same disk as the model."
        )


def resolved(path: Path) -> Path:
    """The absolute path without links. EmitError where no file can have that name."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a zero byte, no working directory
        raise EmitError(f"{str(path)!r} is no path that could be used here ({error}). Give another one.") from None


def _replace(staging: Path, out: Path) -> None:
    """Put `staging` in the place of `out`: in one step, so that there is an output at every moment."""
    if not out.exists() or not any(out.iterdir()):
        os.rename(staging, out)
    elif not exchange(staging, out):
        aside = staging.with_name(staging.name.replace(".partial-", ".replaced-"))
        os.rename(out, aside)
        try:
            os.rename(staging, out)
        except BaseException:  # an interruption too must leave the old output in place
            if not out.exists():
                os.rename(aside, out)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _sweep(out: Path) -> None:
    """Remove what a killed run has left, and put back an output that it had moved aside."""
    prefix = f".{out.name}."
    for left in sorted(out.parent.iterdir(), reverse=True):  # what was replaced first
        kind, _, process = left.name.removeprefix(prefix).partition("-")
        if not left.name.startswith(prefix) or kind not in ("partial", "replaced") or not process.isdigit():
            continue
        if kind == "replaced" and not out.exists():
            os.rename(left, out)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _is_full(error: BaseException) -> bool:
    """Is this a full disk, be it told by a library that knows no OSError (safetensors, tokenizers)?"""
    return getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)


def _explained(error: BaseException, out: Path) -> EmitError:
    if _is_full(error):
        return EmitError(f"the disk is full: {out} was not written, and nothing is left of it. Free some space.")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    name = getattr(error, "filename", None)
    beside = "" if name is None or str(name).startswith(str(out.parent)) else f": {name}"  # a file that was read
    return EmitError(f"{out} could not be written ({reason}{beside}). Nothing is left of it.")


def exchange(first: Path, second: Path) -> bool:
    """Exchange two paths in one step (Linux's renameat2, macOS's renamex_np).

    False where that cannot be done here; then nothing has changed.
    """
    one, two = os.fsencode(first), os.fsencode(second)
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            failed = library.renamex_np(one, two, SWAP)
        else:
            failed = library.renameat2(HERE, one, HERE, two, SWAP)
    except (AttributeError, OSError):  # a C library without it
        return False
    return not failed
