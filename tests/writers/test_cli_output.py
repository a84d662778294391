"""The place that a command writes to: what is there, no space, interruption."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cli_steps import contents, copied, fails, flags, heeding_ctrl_c, offline, succeeds

from sasa_export.files import claimed


def free(count: int) -> Callable[[Path], object]:
    return lambda path: shutil._ntuple_diskusage(10**12, 10**12 - count, count)


def test_an_output_that_is_not_empty(llava: Path, probe: Path, place: Path) -> None:
    out = place / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    arguments = flags(llava, out, probe=probe, verify="files")
    assert f"{out} is not empty. Give another --out, or --force to replace it" in fails(*arguments)
    message = fails(*arguments, "--force")
    assert "holds precious.txt, which sasa-export did not write, so --force does not replace it" in message
    assert contents(place) == {"out/precious.txt": b"mine"}


def test_force_replaces_what_an_export_wrote(llava: Path, probe: Path, place: Path) -> None:
    """And nothing that was put beside it, nor a directory with a manifest that cannot be read."""
    out = place / "out"
    arguments = flags(llava, out, "--force", probe=probe, verify="files")
    succeeds(*arguments)
    succeeds(*arguments, "--threshold", "0.25")
    assert [path.name for path in place.iterdir()] == ["out"]
    assert json.loads((out / "config.json").read_text())["sasa"]["threshold"] == 0.25
    before = contents(out)
    (out / "notes").mkdir()
    (out / "notes" / "mine.txt").write_text("mine")
    (out / "answers.txt").write_text("mine")
    assert "holds answers.txt and 1 more, which sasa-export did not write" in fails(*arguments)
    (out / "answers.txt").unlink()
    (out / "notes" / "mine.txt").unlink()
    (out / "sasa-export.json").write_text("{")
    assert "did not write" in fails(*arguments)
    assert contents(out) == {**before, "sasa-export.json": b"{"}


@pytest.mark.parametrize("name", ["evaluate", "locate"])
def test_force_replaces_no_report_that_is_none(llava: Path, patched: Path, place: Path, name: str) -> None:
    (place / "out").mkdir()
    (place / "out" / "report.html").write_text("mine")
    message = fails(name, *flags(patched if name == "evaluate" else llava, place / "out", "--force"))
    assert "holds report.html, which sasa-export did not write" in message
    assert contents(place) == {"out/report.html": b"mine"}


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("/dev/null", "/dev/null is no directory. Give a directory as --out."),
        ("/proc/patched", "/proc/patched could not be written"),
        ("/dev/null/patched", "/dev/null/patched could not be written"),
    ],
)
def test_places_that_nothing_can_be_written_to(llava: Path, out: str, said: str) -> None:
    """They are told at once, before anything is opened."""
    assert said in fails(*flags(llava, Path(out)))


def test_an_empty_output_and_missing_parents(llava: Path, probe: Path, place: Path) -> None:
    (place / "out").mkdir()
    for out in (place / "out", place / "a" / "b" / "out"):
        succeeds(*flags(llava, out, probe=probe, verify="files"))
    assert sorted(path.name for path in place.iterdir()) == ["a", "out"]
    assert contents(place / "out") == contents(place / "a" / "b" / "out")


def test_an_output_that_would_remove_its_source(llava: Path, probe: Path, tmp_path: Path) -> None:
    """--force replaces what is at --out, which must not be the model that is being patched."""
    source = copied(llava, tmp_path)
    before = contents(source)
    for out in (source, tmp_path):
        message = fails(*flags(source, out, "--force", probe=probe, verify="files"))
        assert "which sasa-export did not write" in message
    assert contents(source) == before


@pytest.mark.parametrize("command", ["export", "locate", "evaluate"])
def test_two_runs_at_once(command: str, llava: Path, patched: Path, place: Path) -> None:
    arguments = flags(patched if command == "evaluate" else llava, place / "out")
    holder, thread = claimed(place / "out"), ThreadPoolExecutor(1)
    thread.submit(holder.__enter__).result()
    assert "another run is writing" in fails(*([] if command == "export" else [command]), *arguments)
    thread.submit(holder.__exit__, None, None, None).result()
    assert not list(place.iterdir())


def test_too_little_space(llava: Path, probe: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = flags(llava, place / "out", probe=probe, verify="files")
    monkeypatch.setattr(shutil, "disk_usage", free(1000))
    assert f"{place} has 0.00 GB free and the patched model needs 0.07 GB" in fails(*arguments)
    # Enough for what is always written, but not for the model of 1 MB, which a link does not copy.
    monkeypatch.setattr(shutil, "disk_usage", free(64_500_000))
    assert "GB free" in fails(*arguments)
    succeeds(*arguments, "--link")


def test_a_real_disk_that_fills_up(
    llava: Path, probe: Path, small_disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the space runs out: in the weights, right behind them in the probe, or in a later file."""
    monkeypatch.setattr(shutil, "disk_usage", free(10**12))
    page = 4096
    weights = -(-(llava / "model.safetensors").stat().st_size // page)  # pages
    for pages in (4, weights - 1, weights, weights + 1, weights + 8):
        disk = small_disk(pages * page)
        message = fails(*flags(llava, disk / "out", probe=probe, verify="files"))
        assert "the disk is full" in message, f"with {pages} pages"
        assert not list(disk.iterdir()), f"with {pages} pages"
    disk = small_disk((weights + 60) * page)
    succeeds(*flags(llava, disk / "out", "--link", probe=probe, verify="files"))  # a link to another disk is a copy
    written = disk / "out" / "model-00001-of-00002.safetensors"
    assert written.read_bytes() == (llava / "model.safetensors").read_bytes()


# Stops when the shards are copied, and waits there for a signal.
SLOW = """
import os, sys, time
from sasa_export.cli import main

def audit(event, arguments):
    if event == "open" and "model-00001-of" in str(arguments[0]) and arguments[2] & os.O_CREAT:
        print("writing", flush=True)
        time.sleep(60)

sys.addaudithook(audit)
main(prog_name="sasa-export")
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interrupted_run(llava: Path, patched: Path, probe: Path, place: Path, number: signal.Signals) -> None:
    """Nothing appears at --out, and what was there stays; nothing is left beside it."""
    shutil.copytree(patched, place / "out")
    before = contents(place)
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *flags(llava, place / "out", "--force", probe=probe, verify="files")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=offline(), preexec_fn=heeding_ctrl_c,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0 and "Traceback" not in stderr
    assert contents(place) == before
