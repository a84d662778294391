"""The one way in which output is written: beside, whole, and by one run at a time."""

import errno
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sasa_export import files
from sasa_export.errors import EmitError
from sasa_export.files import check_apart, check_free, claimed, staged

HOLD = """
import sys
from pathlib import Path
from sasa_export.files import staged
with staged(Path(sys.argv[1]), force=True) as directory:
    (directory / "half.txt").write_text("half")
    print("held", flush=True)
    sys.stdin.readline()
    (directory / "whole.txt").write_text("whole")
"""


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def write(out: Path, text: str = "new", *, force: bool = False) -> None:
    with staged(out, force=force) as directory:
        (directory / "file.txt").write_text(text)


def test_whoever_waits_comes_next(place: Path) -> None:
    """As two first runs do that build the same model in the cache: another process is in the middle of writing."""

    def wait() -> list[str]:
        with claimed(place / "out", wait=True):
            return names(place / "out")

    command = [sys.executable, "-c", HOLD, str(place / "out")]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other,
        ThreadPoolExecutor(1) as thread,
    ):
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(EmitError, match="another run is writing"):
            write(place / "out")
        seen = thread.submit(wait)
        time.sleep(0.2)
        assert not seen.done() and "out" not in names(place)
        other.communicate("go on\n", timeout=60)
        assert seen.result(timeout=60) == ["half.txt", "whole.txt"]
    assert names(place) == ["out"]


def test_an_output_is_replaced_whole_by_two_renames(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that cannot exchange directories."""
    monkeypatch.setattr(files, "exchange", lambda first, second: False)
    write(place / "out", "old")
    write(place / "out", "new", force=True)
    assert names(place) == ["out"]
    assert (place / "out" / "file.txt").read_text() == "new"


def test_interrupted_between_two_renames(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(place / "out", "old")
    rename = os.rename

    def interrupted(source: Path, target: Path) -> None:
        if source.name == ".out.partial":
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(files, "exchange", lambda first, second: False)  # as on a file system without it
    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(place / "out", force=True)
    assert names(place) == ["out"] and (place / "out" / "file.txt").read_text() == "old"


def test_killed_between_two_renames(place: Path) -> None:
    """The old output lies aside, the new one is not in place: the next run puts the old one back first."""
    for name in (".out.replaced", ".out.partial"):
        (place / name).mkdir()
        (place / name / "file.txt").write_text(name)
    with pytest.raises(EmitError, match="is not empty"):
        write(place / "out")
    assert names(place) == ["out"] and (place / "out" / "file.txt").read_text() == ".out.replaced"


def test_a_mount_point_is_never_replaced(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(EmitError, match="mount point"):
        check_free(place / "new", force=True)


def test_inputs_that_an_output_would_remove(place: Path) -> None:
    (place / "out").mkdir()
    for path in (place / "out", place / "out" / "prompts.jsonl"):
        with pytest.raises(EmitError, match="would remove that"):
            check_apart(place / "out", None, path)
    check_apart(place / "out", place / "other", None)


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), EmitError, "the disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), EmitError, "the disk is full"),
        (OSError(errno.EIO, os.strerror(errno.EIO), "/nowhere/shard"), EmitError, "/nowhere/shard"),
        (KeyError("x"), KeyError, "x"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ],
    ids=["full", "full, by a library in Rust", "a file that cannot be read", "any other", "Ctrl-C"],
)
def test_what_goes_wrong_leaves_nothing(place: Path, error: BaseException, raised: type, said: str) -> None:
    with pytest.raises(raised, match=said), staged(place / "out", force=False) as directory:
        (directory / "half.txt").write_text("half")
        raise error
    assert not names(place)
