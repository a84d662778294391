"""The place that a command writes to: what is there, and no space; faults in the middle are in test_faults."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cli_steps import contents, fails, flags, succeeds

from sasa_export.files import claimed


def free(count: int) -> Callable[[Path], object]:
    return lambda path: shutil._ntuple_diskusage(10**12, 10**12 - count, count)


def test_force_replaces_what_an_export_wrote(llava: Path, probe: Path, place: Path) -> None:
    """And nothing that was put beside it, nor a directory with a manifest that cannot be read."""
    out = place / "out"
    arguments = flags(llava, out, "--force", probe=probe, verify="files")
    succeeds(*arguments)
    succeeds(*arguments, "--threshold", "0.25")
    assert [path.name for path in place.iterdir()] == ["out"]
    assert json.loads((out / "config.json").read_text())["sasa"]["threshold"] == 0.25
    before = contents(out)
    assert f"{out} is not empty. Give another --out, or --force to replace it" in fails(*flags(llava, out, probe=probe))
    (out / "notes").mkdir()
    (out / "notes" / "mine.txt").write_text("mine")
    (out / "answers.txt").write_text("mine")
    message = fails(*arguments)
    assert "holds answers.txt and 1 more, which sasa-export did not write, so --force does not replace it" in message
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
        (f"/tmp/{'x' * 300}", "could not be written"),
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
