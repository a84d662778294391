"""Models, probes, prompts and places that tests share."""

import json
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import miniature
import numpy as np
import pytest
import tiny
from cli_steps import Stop, Tiny, flags, succeeds, write_probe

from sasa_export.probe.work import Work

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random probe for a tiny model."""
    path = tmp_path_factory.mktemp("probe") / "probe.safetensors"
    return write_probe(path, np.random.default_rng(0).normal(size=3 * tiny.HIDDEN) * 0.2)


@pytest.fixture(scope="session")
def llava(tiny_model: Tiny) -> Path:
    return tiny_model("llava")


@pytest.fixture(scope="session")
def patched(llava: Path, probe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A patched llava, verified by its files alone. Tests copy it before they write into it."""
    out = tmp_path_factory.mktemp("patched") / "out"
    succeeds(*flags(llava, out, probe=probe, verify="files"))
    return out


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts that even a random model tells apart: each harmful one ends with a word of its own."""
    folder = tmp_path_factory.mktemp("calibration")
    draw = random.Random(0)
    lines = []
    for pair in range(24):
        words = " ".join(draw.choices(("the", "old", "dog", "house", "water", "red"), k=3 + pair % 4))
        picture = None
        if pair % 2:
            picture = f"{pair}.png"
            tiny.random_image(pair).save(folder / picture)
        for label, word in enumerate(("cake", "broken bridges")):
            record = {"image": picture, "prompt": f"{words} {word}", "label": label, "group": f"pair {pair}"}
            lines.append(json.dumps(record))
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The path of each miniature data set. Tests copy it before they break it."""
    root = tmp_path_factory.mktemp("datasets")
    return {name: make(root / name) for name, make in miniature.MAKERS.items()}


@pytest.fixture
def stopped_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[str]]:
    """`stopped_at(count)`: stop before so many arrays of work are written; gives the names of those that were."""
    put, written = Work.put, list[str]()

    def set_to(stop: int | None) -> list[str]:
        def counted(self: Work, name: str, array: np.ndarray) -> None:
            if len(written) == stop:
                raise Stop
            put(self, name, array)
            written.append(name)

        monkeypatch.setattr(Work, "put", counted)
        return written

    return set_to


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty directory that holds the output and nothing else, so that leftovers beside it show."""
    path = tmp_path / "place"
    path.mkdir()
    return path


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`node(script, arguments...)`: what it prints last, as JSON, with the package of the example installed."""
    program, npm = shutil.which("node"), shutil.which("npm")
    if program is None or npm is None:
        pytest.skip("NODE IS NOT INSTALLED: that transformers.js refuses as torch does was NOT tested")
    place = tmp_path_factory.mktemp("javascript")
    for source in ("package.json", "chat.mjs"):
        shutil.copy(HERE.parent / "examples" / "transformers_js" / source, place)
    shutil.copy(HERE / "onnx_format" / "javascript" / "ask.mjs", place)
    install = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline"]
    subprocess.run(install, cwd=place, check=True, capture_output=True)

    def run(*arguments: Any) -> Any:
        command = [program, *map(str, arguments)]
        result = subprocess.run(command, cwd=place, check=False, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
        return json.loads(result.stdout.strip().splitlines()[-1])

    return run
