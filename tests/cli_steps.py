"""How tests run the command: in this process or in one of its own, and what they look at afterwards."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file
from transformers.utils.logging import disable_progress_bar

from sasa_export.cli import main
from sasa_export.report import Silent

Tiny = Callable[..., Path]


class Stop(BaseException):
    """Stands for Ctrl-C."""


class Told(Silent):
    """Keeps the stages that a run tells of, and its warnings."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.warnings: list[str] = []

    def step(self, stage: str, text: str) -> None:
        self.stages.append(stage)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def write_probe(path: Path, weight: Any, bias: float = 0.0) -> Path:
    """A probe of `weight` (features,), as --probe reads it."""
    save_file(
        {"sasa.probe.weight": np.asarray(weight, np.float32), "sasa.probe.bias": np.array(bias, np.float32)}, path
    )
    return path


def write_lane_probe(path: Path, weight: Any, hidden: int, bias: float = 0.0) -> Path:
    """A probe that reads the second lane's end alone: with `weight` (features,), and nothing of the two states."""
    return write_probe(path, np.concatenate([np.asarray(weight), np.zeros(2 * hidden)]), bias)


def flags(model: Path | str, out: Path, *switches: str, **options: Any) -> list[str]:
    """`--model`, `--out` and other options as arguments; switches such as `--force` stand for themselves."""
    arguments = ["--model", str(model), "--out", str(out), *switches]
    for name, value in options.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    return arguments


def invoke(*arguments: str) -> Any:
    disable_progress_bar()  # in a process of its own the command does so before transformers is imported
    return CliRunner().invoke(main, list(arguments))


def succeeds(*arguments: str) -> Any:
    result = invoke(*arguments)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result


def fails(*arguments: str) -> str:
    """Run in this process, and return the one-line error; at the output and beside it all is as it was."""
    before = _written(*arguments)
    result = invoke(*arguments)
    assert isinstance(result.exception, SystemExit), f"{result.exception!r} was not reported as an error"
    assert _written(*arguments) == before
    return message_of(result.exit_code, result.stderr)


def _written(*arguments: str) -> set[Path]:
    """What lies at the output that is named, and beside it under names like its own."""
    out = Path(arguments[arguments.index("--out") + 1]) if "--out" in arguments else Path()
    near = [path for path in out.parent.iterdir() if out.name in path.name] if out.parent.is_dir() and out.name else []
    return {*near, *(path for directory in near if directory.is_dir() for path in directory.rglob("*"))}


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    command = [sys.executable, "-m", "sasa_export", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=offline(), timeout=120)


def offline() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def message_of(code: int, stderr: str) -> str:
    """The error, which must be the last line and the only one of its kind, after steps of ours if any."""
    assert code == 1, stderr
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert [line for line in lines if line.startswith("Error:")] == lines[-1:]
    stages = ("open", "warning", "trace", "load", "calibrate", "rewrite", "onnx", " ")
    assert all(line.startswith(stages) for line in lines[:-1]), stderr
    return lines[-1]


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, by its path."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def copied(directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(directory, tmp_path / "copy"))


def flip(path: Path, offset: int) -> None:
    """Change one byte; a negative offset counts from the end."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


def settle(directory: Path, **settings: Any) -> None:
    """Other settings of the gate in a directory's config.json, and nothing else changed."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["sasa"].update(settings)
    path.write_text(json.dumps(config))


def change_tensors(path: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Change the tensors of a safetensors file in place."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
