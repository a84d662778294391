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

from sasa_export import files as staging
from sasa_export.errors import EmitError, SasaExportError
from sasa_export.files import check_apart, check_free, claimed, exchange, staged

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
    with pytest.raises(EmitError, match="another run is writing") as caught:
        write(place / "out")
    assert "\n" not in str(caught.value)
    assert "out" not in names(place)
    other.communicate("go on\n", timeout=60)
    assert other.returncode == 0
    assert names(place) == ["out"] and names(place / "out") == ["half.txt", "whole.txt"]


def test_a_killed_process_leaves_no_lock(place: Path, other: subprocess.Popen[str]) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait(timeout=60)
    assert ".out.lock" in names(place) and "out" not in names(place)
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


def test_a_claim_holds_for_a_thread_too_and_can_be_repeated(place: Path) -> None:
    caught: list[Exception] = []

    def second() -> None:
        try:
            write(place / "out")
        except SasaExportError as error:
            caught.append(error)

    with claimed(place / "out"), claimed(place / "out"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(timeout=60)
        assert len(caught) == 1 and "another run" in str(caught[0])
        write(place / "out")
    assert names(place) == ["out"]
    write(place / "out", force=True)


def test_many_at_once(place: Path) -> None:
    """However they meet, every run ends well or says why not, and what stands there is one of them, whole."""
    said: list[str] = []

    def run(number: int) -> None:
        for turn in range(20):
            try:
                with staged(place / "out", force=True) as directory:
                    for part in range(3):
                        (directory / f"{part}.txt").write_text(f"{number}/{turn}")
                said.append("done")
            except EmitError as error:
                said.append(str(error))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(said) == 80 and said.count("done") >= 1
    assert all(text == "done" or "another run is writing" in text for text in said)
    assert names(place) == ["out"]
    assert len({path.read_text() for path in (place / "out").iterdir()}) == 1 and len(names(place / "out")) == 3


@pytest.mark.parametrize("can", [True, False], ids=["exchange", "two renames"])
def test_an_output_is_replaced_whole(place: Path, monkeypatch: pytest.MonkeyPatch, can: bool) -> None:
    if not can:
        monkeypatch.setattr(staging, "exchange", lambda first, second: False)
    write(place / "out", "old")
    write(place / "out", "new", force=True)
    assert names(place) == ["out"]
    assert (place / "out" / "file.txt").read_text() == "new"


def test_there_is_an_output_at_every_moment(place: Path) -> None:
    """Who reads while an output is replaced finds the old one or the new one."""
    write(place / "out", "old")
    if not exchange(place / "out", place / "out"):
        pytest.skip("this file system cannot exchange directories")
    stop, missing, seen = threading.Event(), [], set()

    def read() -> None:
        while not stop.is_set():
            try:
                seen.add((place / "out" / "file.txt").read_text())
            except FileNotFoundError:
                missing.append(time.monotonic())

    thread = threading.Thread(target=read)
    thread.start()
    for turn in range(50):
        write(place / "out", f"new {turn}", force=True)
    stop.set()
    thread.join()
    assert not missing and seen


@pytest.mark.parametrize("name", ["out[1]", "a*b?", ".hidden", "ö ü", "x" * 200, "-out", "out.partial-1"])
def test_unusual_names(place: Path, name: str) -> None:
    (place / f".{name}.partial-4194304").mkdir()
    (place / f".{name}.partial-4194304" / "half.txt").write_text("half")
    write(place / name)
    assert names(place) == [name]


@pytest.mark.parametrize("name", ["x" * 250, "x" * 5000, "a\0b"])
def test_impossible_names(place: Path, name: str) -> None:
    with pytest.raises(EmitError) as caught:
        write(place / name)
    assert "\n" not in str(caught.value)
    assert not names(place)


def test_a_loop_of_links(place: Path) -> None:
    (place / "loop").symlink_to("loop")
    with pytest.raises(EmitError):
        write(place / "loop")
    assert names(place) == ["loop"]


def test_places_that_are_never_replaced(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--force does not mean a home directory, the working directory, what lies above them, or a mount point."""
    (place / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(place / "here" / "below")
    monkeypatch.setenv("HOME", str(place / "here"))
    for out in (place, place / "here", Path("/"), Path("..")):
        with pytest.raises(EmitError, match="home or working directory"):
            check_free(out, force=True)
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(EmitError, match="mount point"):
        check_free(place / "new", force=True)


def test_inputs_that_an_output_would_remove(place: Path) -> None:
    for inside in ("model/config.json", "model"):
        path = place / "out" / inside
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text("mine")
        with pytest.raises(EmitError, match="would remove that"):
            check_apart(place / "out", None, path)
    check_apart(place / "out", place / "other", None)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["OSError", "of a library in Rust"],
)
def test_a_full_disk_by_any_name(place: Path, error: Exception) -> None:
    with pytest.raises(EmitError, match="the disk is full"), staged(place / "out", force=False) as directory:
        (directory / "half.txt").write_text("half")
        raise error
    assert not names(place)


def test_a_file_that_cannot_be_read_is_named(place: Path) -> None:
    """It is the source's, and not the output's fault."""
    with pytest.raises(EmitError, match="/nowhere/shard"), staged(place / "out", force=False):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "/nowhere/shard")


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_whatever_else_happens_goes_on(place: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), staged(place / "out", force=False):
        raise error
    assert not names(place)
