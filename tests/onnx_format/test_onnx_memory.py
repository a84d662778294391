"""Whether memory and disk suffice is said before any work, in one line, and nothing is left behind."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from sasa_export import models, pipeline
from sasa_export.cli import main
from sasa_export.onnx import memory

Tiny = Callable[..., Path]
Command = Callable[[str], tuple[int, str]]
GB = 10**9
SHAPES = ((1000, 1000),) * 1000  # 4 GB of weights in float32, as much of a source as an estimate needs


@pytest.fixture
def command(tiny_model: Tiny, probe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs the command up to the point where work would begin; its exit code and its last line."""

    def begun(*given: Any) -> None:
        raise AssertionError("work has begun")

    monkeypatch.setattr(pipeline, "measure", begun)
    model = tiny_model("llava", num_hidden_layers=3)

    def run(form: str) -> tuple[int, str]:
        out = tmp_path / "out"
        given = ["--model", model, "--out", out, "--probe", probe, "--format", form]
        result = CliRunner().invoke(main, [str(word) for word in given])
        if isinstance(result.exception, AssertionError):
            return 0, str(result.exception)
        assert not list(tmp_path.iterdir())
        return result.exit_code, result.stderr.splitlines()[-1]

    return run


LITTLE_MEMORY = (
    r"Error: 0\.1 GB of memory are available and float32 graphs of .* need about \d\.\d GB\. Free some memory"
)
LITTLE_DISK = r"Error: .* has 0\.10 GB free and the patched model needs 0\.13 GB\."


@pytest.mark.parametrize(
    ("memory_left", "disk_left", "said"),
    [(GB // 10, 100 * GB, LITTLE_MEMORY), (8 * GB, GB // 10, LITTLE_DISK), (8 * GB, 100 * GB, "work has begun")],
    ids=["little memory", "little disk", "enough"],
)
def test_too_little_is_said_before_the_work(
    memory_left: int, disk_left: int, said: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It suffices for a directory of safetensors, whose weights are copied, not loaded."""
    monkeypatch.setattr(memory, "available_memory", lambda: memory_left)
    free = shutil._ntuple_diskusage(1000 * GB, 1000 * GB - disk_left, disk_left)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    code, line = command("onnx")
    assert code == int(said != "work has begun") and re.match(said, line)
    assert command("safetensors") == (0, "work has begun")


@pytest.mark.parametrize(
    ("stored", "dtype", "least"),
    [
        (("F16",), "float16", 0),
        (("F16",), "float32", 4 * GB),
        (("F16", "F32"), "float16", 2 * GB),
        (("F32",), "int8", 6 * GB),
    ],
    ids=["the same type stays in its file", "another type", "two types", "the quantizer's copies"],
)
def test_the_memory_of_a_type(stored: tuple[str, ...], dtype: str, least: int) -> None:
    source: Any = SimpleNamespace(name="made up", shards=(SimpleNamespace(shapes=SHAPES, types=stored),))
    needed = memory.needed_memory(source, dtype, run=False) - memory.PROGRAM
    assert least <= needed <= 1.2 * least


def test_a_container_has_less_than_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 10 * GB
    monkeypatch.setattr(models.load.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    monkeypatch.setattr(models.load, "CGROUP", tmp_path)
    assert models.load.available_memory() == free
    (tmp_path / "memory.max").write_text("max\n")
    assert models.load.available_memory() == free
    (tmp_path / "memory.max").write_text("4000000000\n")
    (tmp_path / "memory.current").write_text("3000000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 500000000\nactive_file 100000000\n")
    assert models.load.available_memory() == 1_600_000_000
