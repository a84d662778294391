"""Atomic output: a run writes a directory beside the output, then swaps the two. One run at a time writes an output.

During a run, these may lie beside an output `out`: `.out.lock`, `.out.partial` (the new output) and, where the file
system cannot exchange two directories, `.out.replaced` (the previous output). A killed run leaves them behind. The
next run removes them.
"""

import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from sasa_export.errors import EmitError

SWAP = 2  # RENAME_EXCHANGE of Linux and RENAME_SWAP of macOS
WORKING_DIRECTORY = -100  # AT_FDCWD of Linux: relative paths start there


@contextmanager
def staged(out: Path, *, force: bool, needed_bytes: int = 0) -> Iterator[Path]:
    """Yield a new directory beside `out`. It replaces `out` if the block succeeds, and is deleted otherwise.

    `out` stays claimed during the block.

    Raises EmitError, before or in the block, where `out` is taken or not writable, or the disk too small or full.
    """
    out = out.resolve()
    with claimed(out), _explained(out):
        check_free(out, force=force)
        check_disk(out, needed_bytes)
        staging = _beside(out, "partial")
        staging.mkdir()
        try:
            yield staging
            check_free(out, force=force)
            _replace(staging, out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def claimed(out: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other runs from writing `out` during the block. First remove what a killed run left beside it.

    The claim is a lock that the operating system releases when the process ends, even when it is killed. Within the
    block, `claimed` and `staged` may be used again for the same `out`.

    Args:
        out: the output directory, which need not exist. Missing parent directories are created.
        wait: wait for the other run instead of raising EmitError.
    """
    out = out.resolve()
    lock = FileLock(_beside(out, "lock"), is_singleton=True)  # a singleton may be acquired again
    with _explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        # FileLock would report a directory that is not writable as locked by another run.
        tempfile.TemporaryFile(dir=out.parent).close()
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            raise EmitError(f"another run is writing {out}. Wait until it is done, or give another --out.") from None
    outermost = lock.lock_counter == 1
    try:
        if outermost:
            with _explained(out):
                _sweep(out)
        yield
    finally:
        if outermost:
            # Removed while still locked: a waiting run sees that the file is gone, and makes a new one.
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def write_whole(path: Path, text: str) -> None:
    """Write a text file in one step, replacing an existing one. Raise EmitError where that fails."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise EmitError(f"{path} could not be written ({error.strerror or error}). It is as it was before.") from None
    finally:
        partial.unlink(missing_ok=True)


def check_apart(out: Path, *inputs: Path | None) -> None:
    """Raise EmitError where one of the inputs, the source model or a file, lies in `out` and would be removed."""
    for path in inputs:
        if path is not None and path.resolve().is_relative_to(out.resolve()):
            what = "the source model itself" if path.is_dir() else str(path)
            raise EmitError(f"{out} holds {what}, and writing it would remove that. Give another --out.")


def check_free(out: Path, *, force: bool) -> None:
    """Raise EmitError where `out` is a file, a mount point, or not empty (unless `force`)."""
    out = out.resolve()
    with _explained(out):
        if out.exists() and not out.is_dir():
            raise EmitError(f"{out} is no directory. Give a directory as --out.")
        if os.path.ismount(out):
            raise EmitError(f"{out} is a mount point, which cannot be replaced whole. Give a directory below it.")
        if out.is_dir() and any(out.iterdir()) and not force:
            raise EmitError(f"{out} is not empty. Give another --out, or --force to replace it.")


def check_disk(out: Path, needed_bytes: int) -> None:
    """Raise EmitError where the disk of `out` has too little free space. The parent of `out` must exist."""
    place = out.resolve().parent
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise EmitError(
            f"{place} has {free / 1e9:.2f} GB free and the patched model needs {needed_bytes / 1e9:.2f} GB. Free some "
            "space, choose another --out, or use --link on the same disk as the model."
        )


def exchange(first: Path, second: Path) -> bool:
    """Exchange two paths in one step (Linux's renameat2, macOS's renamex_np).

    Return False where the system cannot do this. Then both paths are unchanged.
    """
    one, two = os.fsencode(first), os.fsencode(second)
    library = ctypes.CDLL(None)
    try:
        if sys.platform == "darwin":
            return not library.renamex_np(one, two, SWAP)
        return not library.renameat2(WORKING_DIRECTORY, one, WORKING_DIRECTORY, two, SWAP)
    except AttributeError:  # the C library lacks the function
        return False


def _beside(out: Path, kind: str) -> Path:
    return out.parent / f".{out.name}.{kind}"


def _replace(staging: Path, out: Path) -> None:
    """Move `staging` to `out`, in one step where the system can, so that an output exists at every moment."""
    if not out.exists() or not any(out.iterdir()):
        os.rename(staging, out)
    elif not exchange(staging, out):
        os.rename(out, _beside(out, "replaced"))
        try:
            os.rename(staging, out)
        finally:
            _sweep(out)


def _sweep(out: Path) -> None:
    """Remove what a killed run left behind, and restore an output that it had moved aside."""
    replaced = _beside(out, "replaced")
    if replaced.exists() and not out.exists():
        os.rename(replaced, out)
    for left in (replaced, _beside(out, "partial")):
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _explained(out: Path) -> Iterator[None]:
    """Raise EmitError for operating system errors. Safetensors reports a full disk with an error type of its own."""
    try:
        yield
    except Exception as error:
        if os.strerror(errno.ENOSPC) in str(error):
            message = f"the disk is full: {out} was not written, and nothing is left of it. Free some space."
        elif isinstance(error, OSError):
            message = f"{out} could not be written ({error}). Nothing is left of it."
        else:
            raise
        raise EmitError(message) from None
