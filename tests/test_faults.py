"""Killed at any point, or out of disk at any point: the output is the old one or the new one, and a rerun succeeds.

A handful of points by default; `SASA_FAULTS=all` tries a dozen of each kind in each command (`make fuzz`).
"""

import hashlib
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
from faulty import CALL, NEEDS_SPACE, Driver, Ended
from records import note

from sasa_export.errors import EmitError
from sasa_export.files import claimed
from sasa_export.research.evaluate import EvaluateOptions, evaluate

EVERY = os.environ.get("SASA_FAULTS") == "all"
# What is tried by default, kills and full disks; the ONNX export and the evaluation take longest to begin.
FEW = {"safetensors": (3, 3), "onnx": (0, 0), "calibration": (2, 1), "locate": (2, 2), "evaluate": (2, 1)}
MANY = (12, 12)
NAMES = {
    "safetensors": "export, safetensors", "onnx": "export, ONNX", "calibration": "export with calibration",
    "locate": "locate", "evaluate": "evaluate",
}  # fmt: skip
RESUMED = ("locate", "evaluate")
AGAIN = 6  # model calls that every run makes, to trace, and those of the batch that was cut off
WORDS = {0: ("cake", "rice", "apples", "river"), 1: ("broken", "fire", "knife", "old")}

pytestmark = pytest.mark.xdist_group("llava")


def write_prompts(folder: Path, name: str, groups: int) -> Path:
    """Pairs of prompts that are easily told apart, every third with pictures."""
    draw = random.Random(name)
    lines = []
    for group in range(groups):
        for label in (0, 1):
            image = None
            if group % 3 == 0:
                image = f"{name}-{group}-{label}.png"
                tiny.random_image(draw.randrange(10**6)).save(folder / image)
            asked = f"{name} {group} " + " ".join(draw.choices(WORDS[label], k=6))
            lines.append({"image": image, "prompt": asked, "label": label, "group": f"pair {group}"})
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder whose files are watched; `place/out` in it is the output."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def driver(ground: Path) -> Iterator[Driver]:
    found = Driver(ground / "place")
    yield found
    found.close()


@dataclass(frozen=True)
class Command:
    """A command, what it writes when nothing goes wrong, and the points that it passes."""

    driver: Driver
    place: Path
    arguments: tuple[str, ...]
    whole: dict[str, str]
    old: dict[str, str]
    points: tuple[str, ...]

    def run(self, fault: tuple[str, int] | None = None) -> Ended:
        return self.driver.run([*self.arguments], fault)

    def begin(self, *, replaces: bool) -> None:
        """An empty place, or one with an older output."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        if replaces:
            write_old(self.place / "out")

    def check(self, *, replaces: bool, new: bool) -> None:
        """The output is the old one (none, where it replaces nothing), or the whole new one if it may be that."""
        found = contents(self.place / "out")
        assert found == (self.old if replaces else {}) or (new and found == self.whole), sorted(found)

    def rerun(self) -> Ended:
        """The same command, undisturbed, succeeds and leaves its output alone."""
        again = self.run()
        assert again.code == 0, again.said
        assert contents(self.place / "out") == self.whole
        assert [path.name for path in self.place.iterdir()] == ["out"]
        return again


def write_old(out: Path) -> None:
    out.mkdir()
    (out / "precious.txt").write_text("mine")


def contents(directory: Path) -> dict[str, str]:
    """Digest of each file below a directory, by name."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def command(driver: Driver, ground: Path, guard: Callable[..., Any], tiny_model: Callable[..., Path]) -> Any:
    """`command(name)`: one of the commands above, run once without a fault."""
    place = ground / "place"
    model, probe = str(tiny_model("llava")), guard("llava").directory.parent / "probe.safetensors"
    layers = ["--safety-layer", "2", "--semantic-layer", "4"]
    given = ["--model", model, *layers, "--verify", "files", "--force"]
    calibration, data = (str(write_prompts(ground, name, 12)) for name in ("calibration", "data"))
    kept: dict[str, Command] = {}

    def arguments(name: str) -> list[str]:
        out = ["--out", str(place / "out")]
        if name in ("safetensors", "onnx"):
            return [*given, *out, "--probe", str(probe), "--format", name]
        if name == "calibration":
            return [*given, *out, "--calibration", calibration, "--max-false-positive-rate", "0.3", "--batch-size", "8"]
        if name == "locate":
            sweep = ["--ablation-prompts", "2", "--blocks", "2", "--pairs", "2:4", "--batch-size", "8"]
            return ["locate", "--model", model, *out, "--force", "--calibration", calibration, *sweep]
        patched = ["--model", str(guard("llava").directory), "--data", data, "--calibration", calibration]
        return ["evaluate", *patched, *out, "--force", "--max-new-tokens", "4", "--timing", "0", "--batch-size", "8"]

    def get(name: str) -> Command:
        if name not in kept:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            write_old(place / "old")
            old = contents(place / "old")
            shutil.rmtree(place / "old")
            found = driver.warm(arguments(name))
            assert found.code == 0, found.said
            kept[name] = Command(driver, place, tuple(arguments(name)), contents(place / "out"), old, found.points)
        return kept[name]

    return get


def spread(places: list[int], count: int) -> list[int]:
    """So many of these places, evenly, the first and the last among them."""
    count = min(count, len(places))
    if count < 2:
        return places[len(places) // 2 :][:count]
    return [places[round(step * (len(places) - 1) / (count - 1))] for step in range(count)]


def left_behind(command: Command) -> int:
    """How many finished results lie beside the output; nothing else may but for what a killed run leaves."""
    work = command.place / ".out.work"
    return sum(path.suffix in (".npy", ".jsonl") for path in work.iterdir()) if work.is_dir() else 0


def resumed(command: Command, at: int, left: int, again: Ended) -> None:
    """The rerun went on with what was finished: but for the batch that was cut off, no model call was made twice."""
    if left:
        assert "results of an interrupted run" in again.said
    before, after = command.points[:at].count(CALL), again.points.count(CALL)
    assert before + after <= command.points.count(CALL) + AGAIN, (before, after, command.points.count(CALL))


@pytest.mark.parametrize("name", NAMES)
def test_killed(command: Callable[[str], Command], name: str) -> None:
    count = (MANY if EVERY else FEW[name])[0]
    if not count:
        pytest.skip("SASA_FAULTS=all tries it")
    found = command(name)
    places = spread(list(range(len(found.points))), count)
    for number, at in enumerate(places):
        found.begin(replaces=number % 2 == 1)
        assert found.run(("kill", at)).code == -signal.SIGKILL
        found.check(replaces=number % 2 == 1, new=True)
        left, ended = left_behind(found), contents(found.place / "out") == found.whole
        again = found.rerun()
        if name in RESUMED and not ended:
            resumed(found, at, left, again)
    note("faults", group="faults", what=f"{NAMES[name]}: killed", tried=len(places), of=len(found.points), good=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk(command: Callable[[str], Command], name: str) -> None:
    """Full from a point on: an error of one line, the old output in place, finished work alone beside it."""
    count = (MANY if EVERY else FEW[name])[1]
    if not count:
        pytest.skip("SASA_FAULTS=all tries it")
    found = command(name)
    needing = [at for at, what in enumerate(found.points) if what in NEEDS_SPACE]
    places = spread(needing, count)
    for number, at in enumerate(places):
        found.begin(replaces=number % 2 == 1)
        ended = found.run(("full", at))
        assert ended.code == 1, ended.said
        (error,) = [line for line in ended.said.splitlines() if line.startswith("Error: ")]
        assert "disk is full" in error or "No space left" in error
        assert "Traceback" not in ended.said and ended.said.endswith(error + "\n")
        found.check(replaces=number % 2 == 1, new=False)
        left = left_behind(found)
        names = {path.name for path in found.place.iterdir()}
        assert names <= {"out", ".out.work"} if left else names <= {"out"}, names
        again = found.rerun()
        if name in RESUMED:
            resumed(found, at, left, again)
    note("faults", group="faults", what=f"{NAMES[name]}: disk full", tried=len(places), of=len(needing), good=True)


def test_two_evaluations_at_once(tmp_path: Path, guard: Callable[..., Any]) -> None:
    """They would share the finished work that lies beside the report."""
    with claimed(tmp_path / "out"):
        thread = ThreadPoolExecutor(1)
        options = EvaluateOptions(model=guard("llava").directory, out=tmp_path / "out")
        with pytest.raises(EmitError, match="another run is writing"):
            thread.submit(evaluate, options).result()
        assert not (tmp_path / ".out.work").exists()
