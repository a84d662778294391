"""Whether memory and disk suffice is said before any work, in one line, and nothing is left behind."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from sasa_export import pipeline
from sasa_export.cli import main
from sasa_export.models import Source, memory, open_source
from sasa_export.writers.onnx import memory

Tiny = Callable[..., Path]
GB = 10**9


@pytest.fixture
def command(
    tiny_model: Tiny, probe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str]]:
    """Runs the command up to the point where work would begin; its exit code and its last line."""

    def begun(*given: Any) -> None:
        raise AssertionError("work has begun")

    monkeypatch.setattr(pipeline, "measure", begun)
    model = tiny_model("llava", num_hidden_layers=3)

    def run(**options: str) -> tuple[int, str]:
        given = {"model": str(model), "out": str(tmp_path / "out"), "probe": str(probe), "format": "onnx"} | options
        result = CliRunner().invoke(main, [word for key, value in given.items() for word in (f"--{key}", value)])
        if isinstance(result.exception, AssertionError):
            return 0, str(result.exception)
        assert not list(tmp_path.iterdir())
        errors = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
        assert len(errors) == 1 and errors[0] == result.stderr.splitlines()[-1], result.stderr
        return result.exit_code, errors[0]

    return run


def source(shapes: list[tuple[int, ...]]) -> Source:
    made: Any = SimpleNamespace(name="made up", shards=(SimpleNamespace(shapes=tuple(shapes)),))
    return made


def test_too_little_memory(command: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "available_memory", lambda: GB // 10)
    code, line = command()
    assert code == 1
    assert re.match(r"Error: 0\.1 GB of memory are available and float32 graphs of .* need about \d\.\d GB\. ", line)
    assert line.endswith("Free some memory, or use a larger machine.")


def test_enough_memory(command: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "available_memory", lambda: 8 * GB)
    assert command() == (0, "work has begun")


def test_safetensors_ask_for_none(command: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "available_memory", lambda: 0)
    assert command(format="safetensors") == (0, "work has begun")


def test_too_little_disk_is_said_before_the_work(
    command: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil._ntuple_diskusage(GB, GB - 100_000_000, 100_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    code, line = command()
    assert code == 1
    assert "has 0.10 GB free and the patched model needs 0.13 GB." in line
    assert command(format="safetensors") == (0, "work has begun")


def test_what_would_help_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 GB of float32 weights: with 3 GB to spare float16 goes, and without running the graphs float32 too."""
    large = source([(1000, 1000)] * 1000)
    monkeypatch.setattr(room, "stored_types", lambda source: {"float32"})
    options: Any = SimpleNamespace(onnx_dtype="float32", verify="full")
    for free, said in ((7 * GB, "give --onnx-dtype float16, or give --verify files"), (GB, "use a larger machine")):
        monkeypatch.setattr(room, "available_memory", lambda free=free: free)
        with pytest.raises(Exception, match=said):
            room.check_memory(large, options)
    monkeypatch.setattr(room, "available_memory", lambda: 20 * GB)
    room.check_memory(large, options)


def test_weights_of_the_same_type_stay_in_their_file(monkeypatch: pytest.MonkeyPatch) -> None:
    large = source([(1000, 1000)] * 1000)
    monkeypatch.setattr(room, "stored_types", lambda source: {"float16"})
    assert room.needed_memory(large, "float16", run=False) == room.PROGRAM
    assert room.needed_memory(large, "float32", run=False) > room.PROGRAM + 4 * GB
    monkeypatch.setattr(room, "stored_types", lambda source: {"float16", "float32"})
    assert room.needed_memory(large, "float16", run=False) > room.PROGRAM + 2 * GB


def test_the_types_of_a_source(tiny_model: Tiny) -> None:
    assert room.stored_types(open_source(str(tiny_model("llava")))) == {"float32"}


def test_a_container_has_less_than_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 10 * GB
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.available_memory() == free
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory() == free
    (tmp_path / "memory.max").write_text("4000000000\n")
    (tmp_path / "memory.current").write_text("3000000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 500000000\nactive_file 100000000\n")
    assert memory.available_memory() == 1_600_000_000
