"""Patched models and what transformers says to their prompts, which `reference.py` writes once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "serving"
SASA_EXPORT = ROOT / ".venv" / "bin" / "python"
BOTH = pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])  # Model Runners


@dataclass(frozen=True)
class Model:
    """A patched directory, and its prompts."""

    folder: Path
    prompts: list[dict[str, Any]]

    @property
    def directory(self) -> Path:
        return self.folder / "patched"

    @property
    def sasa(self) -> dict[str, Any]:
        return json.loads((self.directory / "config.json").read_text())["sasa"]

    def some(self, *, refused: bool) -> list[dict[str, Any]]:
        return [prompt for prompt in self.prompts if prompt["refused"] == refused]

    def edited(self, folder: Path, **settings: Any) -> Path:
        """A copy of the patched directory in `folder`, beside the pictures, with other settings in config.json."""
        out = shutil.copytree(self.directory, folder / "patched")
        (folder / "pictures").symlink_to(self.folder / "pictures")
        config = json.loads((out / "config.json").read_text())
        config["sasa"] |= settings
        (out / "config.json").write_text(json.dumps(config))
        return out

    def check(self, found: list[dict[str, Any]], prompts: list[dict[str, Any]]) -> None:
        """Fail where P(unsafe), verdict or greedy answer are not those of transformers, or a refusal is not named."""
        for outcome, prompt in zip(found, prompts, strict=True):
            assert outcome["error"] is None and outcome["ids"] == prompt["ids"]
            assert outcome["probability"] == pytest.approx(prompt["probability"], abs=1e-4)
            assert same(outcome["answers"][0], prompt["answer"])
            assert (outcome["reasons"][0] == "content_filter") == prompt["refused"]


def same(found: list[int], expected: list[int]) -> bool:
    """Whether two answers are the same; one may hold an end of sequence more."""
    both = min(len(found), len(expected))
    return found[:both] == expected[:both] and abs(len(found) - len(expected)) <= 1


@pytest.fixture(scope="session")
def model() -> Callable[[str], Model]:
    """`model(name)`: one of reference.py's models."""
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([SASA_EXPORT, Path(__file__).with_name("reference.py"), WORK], check=True, env=settings)

    def get(name: str) -> Model:
        return Model(WORK / name, json.loads((WORK / name / "reference.json").read_text()))

    return get
