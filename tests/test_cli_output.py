"""The command line and the place it writes to: what is there, no space, interruption."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_steps import FINISHED, contents, fails, flags, heeding_ctrl_c, offline, plenty, script_fails, succeeds

from sasa_export import files as staging
from sasa_export.report import Console
from sasa_export.writers import files as emit_files

# -------------------------------------------------------------------------------------- the output's place


def test_an_output_that_is_not_empty(llava: Path, probe: Path, place: Path) -> None:
    out = place / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    arguments = flags(llava, out, probe=probe, verify="files")
    message = script_fails(*arguments)
    assert f"{out} is not empty. Give another --out, or --force to replace it" in message
    assert "is not empty" in fails("fetch", *flags(llava, out))
    assert contents(place) == {"out/precious.txt": b"mine"}
    succeeds(*arguments, "--force")
    assert sorted(path.name for path in place.iterdir()) == ["out"]
    assert (out / "sasa-export.json").exists() and not (out / "precious.txt").exists()


def test_an_output_that_is_a_file(llava: Path, probe: Path, place: Path) -> None:
    (place / "out").write_text("mine")
    for switches in ((), ("--force",)):
        arguments = flags(llava, place / "out", *switches, probe=probe, verify="files")
        assert "is a file. Give a directory as --out" in fails(*arguments)
        assert "is a file" in fails("fetch", *flags(llava, place / "out", *switches))
        inside = flags(llava, place / "out" / "inside", *switches, probe=probe, verify="files")
        assert "could not be written" in fails(*inside)
    assert contents(place) == {"out": b"mine"}


def test_an_empty_output_and_missing_parents(llava: Path, probe: Path, place: Path) -> None:
    (place / "out").mkdir()
    succeeds(*flags(llava, place / "out", probe=probe, verify="files"))
    succeeds(*flags(llava, place / "a" / "b" / "out", probe=probe, verify="files"))
    assert sorted(path.name for path in place.iterdir()) == ["a", "out"]
    assert contents(place / "out") == contents(place / "a" / "b" / "out")


def test_a_linked_output_is_replaced_whole(llava: Path, probe: Path, place: Path, tmp_path: Path) -> None:
    """An output that is a symbolic link: no matter what becomes of the link, nothing is left beside it."""
    (tmp_path / "elsewhere").mkdir()
    (place / "out").symlink_to(tmp_path / "elsewhere")
    succeeds(*flags(llava, place / "out", "--force", probe=probe, verify="files"))
    assert [path.name for path in place.iterdir()] == ["out"]


def test_names_with_brackets_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Square brackets in a path are no markup."""
    console = Console()
    console.step("open", "models[/b]/x[red]: family")
    console.warn("models[/b]/x[red]")
    console.check(True, "a[/i]", "b[dim]")
    printed = capsys.readouterr().err
    assert printed.count("models[/b]/x[red]") == 2
    assert "✓ a[/i]: b[dim]" in printed


# ----------------------------------------------------------------------------------------------- no space


def test_too_little_space(llava: Path, probe: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    little = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: little)
    message = fails(*flags(llava, place / "out", probe=probe, verify="files"))
    assert f"{place} has 0.00 GB free and the patched model needs 0.07 GB" in message
    assert "GB free" in fails("fetch", *flags(llava, place / "out"))
    assert not list(place.iterdir())


def test_a_disk_that_fills_up(llava: Path, probe: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(emit_files.shutil, "copyfile", full)
    message = fails(*flags(llava, place / "out", probe=probe, verify="files"))
    assert "the disk is full" in message and "nothing is left of it" in message
    assert not list(place.iterdir())


def test_a_real_disk_that_fills_up(
    llava: Path, probe: Path, small_disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the space runs out: in the weights, right behind them in the probe, or in a later file."""
    monkeypatch.setattr(shutil, "disk_usage", plenty)
    page = 4096
    weight_pages = -(-(llava / "model.safetensors").stat().st_size // page)
    for pages in (4, weight_pages - 1, weight_pages, weight_pages + 1, weight_pages + 8, weight_pages + 16):
        disk = small_disk(pages * page)
        message = fails(*flags(llava, disk / "out", probe=probe, verify="files"))
        assert "the disk is full" in message, f"with {pages} pages"
        assert not list(disk.iterdir()), f"with {pages} pages"
    disk = small_disk((weight_pages + 60) * page)
    succeeds(*flags(llava, disk / "out", probe=probe, verify="files"))


# ------------------------------------------------------------------------------------------- interruption

# Stops once the weights are written, and waits there for a signal.
SLOW = """
import time
from sasa_export.writers import weights

bring = weights._bring

def slow(*arguments, **options):
    digest = bring(*arguments, **options)
    print("emitting", flush=True)
    time.sleep(60)
    return digest

weights._bring = slow

from sasa_export.cli import main
main(prog_name="sasa-export")
"""


def interrupt(arguments: list[str], number: signal.Signals) -> tuple[int, str]:
    """Send a signal to a run in the middle of writing. Returns its exit code and standard error."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=offline(),
        preexec_fn=heeding_ctrl_c,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "emitting\n"
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    return process.returncode, stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_an_interrupted_run(llava: Path, probe: Path, place: Path, number: signal.Signals) -> None:
    """Nothing appears at --out, and what was there stays; the next run sweeps up after one that was killed."""
    old, new = place / "old", place / "new"
    old.mkdir()
    (old / "precious.txt").write_text("mine")
    # Killed in either place: the sweep goes by the output's name.
    out = new if number == signal.SIGINT else old
    arguments = flags(llava, out, "--force", probe=probe, verify="files")
    code, stderr = interrupt(arguments, number)
    assert code != 0
    assert "Traceback" not in stderr
    assert not new.exists()
    assert contents(old) == {"precious.txt": b"mine"}
    if number != signal.SIGKILL:  # which no program can answer
        assert [path.name for path in place.iterdir()] == ["old"]
    succeeds(*arguments)
    assert {path.name for path in place.iterdir()} == {"old", out.name}
    assert "sasa-export.json" in contents(out) and "precious.txt" not in contents(out)


def test_killed_between_the_two_renames(llava: Path, probe: Path, place: Path) -> None:
    """The old output lies aside, the new one is not in place: the next run puts the old one back first."""
    aside = place / f".out.replaced-{FINISHED}"
    aside.mkdir()
    (aside / "precious.txt").write_text("mine")
    (place / f".out.partial-{FINISHED}").mkdir()
    arguments = flags(llava, place / "out", probe=probe, verify="files")
    assert "is not empty" in fails(*arguments)
    assert contents(place) == {"out/precious.txt": b"mine"}
    succeeds(*arguments, "--force")
    assert [path.name for path in place.iterdir()] == ["out"]


def test_interrupted_between_the_two_renames(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = place / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    rename = os.rename

    def interrupted(source: Path, target: Path) -> None:
        if Path(target) == out and ".partial-" in Path(source).name:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(staging, "exchange", lambda first, second: False)  # as on a file system without it
    monkeypatch.setattr(staging.os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), staging.staged(out, force=True) as directory:
        (directory / "new.txt").write_text("new")
    assert contents(place) == {"out/precious.txt": b"mine"}


def test_leftovers_of_a_run_with_this_process_number(place: Path) -> None:
    """In a container every run has the same number, so a leftover may carry this run's own."""
    left = place / f".out.partial-{os.getpid()}"
    left.mkdir()
    (left / "half.txt").write_text("half")
    with staging.staged(place / "out", force=False) as directory:
        (directory / "whole.txt").write_text("whole")
    assert contents(place) == {"out/whole.txt": b"whole"}


def test_the_sweep_leaves_others_alone(place: Path) -> None:
    """Names that only look alike are not this run's leftovers."""
    names = [".out.backup-1", ".out.partial-x", f".other.partial-{FINISHED}", ".out.partial"]
    for name in names:
        (place / name).mkdir()
    with staging.staged(place / "out", force=False):
        pass
    assert {path.name for path in place.iterdir()} == {"out", *names}
