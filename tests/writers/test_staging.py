"""The one way in which output is written: beside, whole, and by one run at a time."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

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


@pytest.fixture
def other(place: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process in the middle of writing `place/out`; a line lets it go on."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(place / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def write(out: Path, text: str = "new", *, force: bool = False) -> None:
    with staged(out, force=force) as directory:
        (directory / "file.txt").write_text(text)


def test_another_process_wins(place: Path, other: subprocess.Popen[str]) -> None:
    with pytest.raises(EmitError, match="another run is writing"):
        write(place / "out")
    assert "out" not in names(place)
    other.communicate("go on\n", timeout=60)
    assert names(place) == ["out"] and names(place / "out") == ["half.txt", "whole.txt"]


def test_a_killed_process_leaves_no_lock(place: Path, other: subprocess.Popen[str]) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait(timeout=60)
    assert names(place) == [".out.lock", ".out.partial"]
    write(place / "out")
    assert names(place) == ["out"] and names(place / "out") == ["file.txt"]


def test_whoever_waits_comes_next(place: Path, other: subprocess.Popen[str]) -> None:
    """As two first runs do that build the same model in the cache."""
    seen: list[list[str]] = []

    def wait() -> None:
        with claimed(place / "out", wait=True):
            seen.append(names(place / "out"))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.2)
    assert not seen
    other.communicate("go on\n", timeout=60)
    thread.join(timeout=60)
    assert seen == [["half.txt", "whole.txt"]]
    assert names(place) == ["out"]


def test_a_claim_can_be_repeated_and_holds_against_other_threads(place: Path) -> None:
    caught: list[EmitError] = []

    def second() -> None:
        try:
            write(place / "out", force=True)
        except EmitError as error:
            caught.append(error)

    with claimed(place / "out"):
        with claimed(place / "out"):
            write(place / "out")
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(timeout=60)
        assert len(caught) == 1 and "another run" in str(caught[0])
    assert names(place) == ["out"]


def test_an_output_is_replaced_whole(place: Path) -> None:
    write(place / "out", "old")
    with pytest.raises(EmitError, match="is not empty"):
        write(place / "out")
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


@pytest.mark.parametrize("name", ["out[1]", ".hidden", "ö ü", "x" * 200, "-out"])
def test_unusual_names(place: Path, name: str) -> None:
    (place / f".{name}.partial").mkdir()
    (place / f".{name}s.partial").mkdir()  # of another output
    write(place / name)
    assert names(place) == sorted([name, f".{name}s.partial"])


@pytest.mark.parametrize("name", ["x" * 300, "file/out"])
def test_impossible_places(place: Path, name: str) -> None:
    (place / "file").write_text("mine")
    with pytest.raises(EmitError, match="could not be written"):
        write(place / name)
    with pytest.raises(EmitError, match="is no directory"):
        write(place / "file", force=True)
    assert names(place) == ["file"]


def test_places_that_are_never_replaced(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--force does not mean a home directory, the working directory, what lies above them, or a mount point."""
    (place / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(place / "here" / "below")
    monkeypatch.setenv("HOME", str(place / "here"))
    for out in (place, place / "here", Path("..")):
        with pytest.raises(EmitError, match="home or working directory"):
            check_free(out, force=True)
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
    "error, said",
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "the disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (OSError(errno.EIO, os.strerror(errno.EIO), "/nowhere/shard"), "/nowhere/shard"),
    ],
    ids=["full", "full, by a library in Rust", "a file that cannot be read"],
)
def test_what_the_system_refuses(place: Path, error: Exception, said: str) -> None:
    with pytest.raises(EmitError, match=said), staged(place / "out", force=False) as directory:
        (directory / "half.txt").write_text("half")
        raise error
    assert not names(place)


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_whatever_else_happens_goes_on(place: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), staged(place / "out", force=False):
        raise error
    assert not names(place)
