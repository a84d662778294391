"""Killed, interrupted or out of disk at any point: the output is the old one or the new one, and a rerun succeeds."""

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cli_steps import contents, succeeds
from faulty import FULL, NEEDS_SPACE, Ended, run

OLD = {"precious.txt": b"mine", "sasa-export.json": b'{"files": {"precious.txt": ""}}'}  # an older output of ours
# How many points are tried by default, and by `make test-slow`.
TRIED = [
    pytest.param("safetensors", 3),
    pytest.param("onnx", 2, marks=pytest.mark.slow),  # each is an export, and another one after it
    *(pytest.param(name, 6, marks=pytest.mark.slow) for name in ("safetensors", "calibration")),
    *(pytest.param(name, 6, marks=pytest.mark.slow) for name in ("locate", "evaluate")),
]


@dataclass(frozen=True)
class Command:
    """A command, what it writes when nothing goes wrong, and the points that it passes."""

    arguments: list[str]
    place: Path
    whole: dict[str, bytes]
    points: list[str]

    def run(self, fault: tuple[int, int] | None = None) -> Ended:
        return run(self.arguments, self.place, self.place.parent / "log.txt", fault)

    def begin(self) -> None:
        """A place with an older output."""
        shutil.rmtree(self.place)
        (self.place / "out").mkdir(parents=True)
        for name, data in OLD.items():
            (self.place / "out" / name).write_bytes(data)

    def rerun(self) -> None:
        """The same command, undisturbed, succeeds and leaves its output alone."""
        again = self.run()
        assert again.code == 0, again.said
        assert contents(self.place / "out") == self.whole
        assert [path.name for path in self.place.iterdir()] == ["out"]


@pytest.fixture
def command(llava: Path, patched: Path, probe: Path, calibration: Path, place: Path) -> Callable[[str], Command]:
    """`command(name)`: one of the commands, run once without a fault."""
    records = [json.loads(line) for line in calibration.read_text().splitlines()]
    asked = place.parent / "asked.jsonl"  # of other requests than calibration's
    asked.write_text(
        "".join(
            json.dumps({**record, "prompt": f"{record['prompt']} now"}) + "\n"
            for record in records
            if not record["image"]
        )
    )
    export = ["--model", str(llava), "--verify", "files", "--safety-layer", "2", "--semantic-layer", "4"]
    arguments = {
        "safetensors": [*export, "--probe", str(probe)],
        "onnx": [*export, "--probe", str(probe), "--format", "onnx"],
        "calibration": [*export, "--calibration", str(calibration), "--max-false-positive-rate", "0.3"],
        "locate": ["locate", "--model", str(llava), "--calibration", str(calibration), "--pairs", "2:4"],
        "evaluate": ["evaluate", "--model", str(patched), "--data", str(asked), "--calibration",
                     str(calibration), "--max-new-tokens", "4"],
    }  # fmt: skip

    def get(name: str) -> Command:
        given = [*arguments[name], "--out", str(place / "out"), "--force"]
        succeeds(*given)  # imports in this process what the forks then find imported
        found = Command(given, place, contents(place / "out"), [])
        found.begin()
        return replace(found, points=found.run().points)

    return get


def evenly(points: list[int], count: int) -> list[int]:
    """So many of these points, the first and the last among them."""
    steps = min(count, len(points)) - 1
    return [points[round(step * (len(points) - 1) / steps)] for step in range(steps + 1)]


@pytest.mark.parametrize("name, count", TRIED)
def test_killed(command: Callable[[str], Command], name: str, count: int) -> None:
    found = command(name)
    for at in evenly(list(range(len(found.points))), count):
        found.begin()
        assert found.run((signal.SIGKILL, at)).code == -signal.SIGKILL
        assert contents(found.place / "out") in (OLD, found.whole)
        found.rerun()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_interrupted(command: Callable[[str], Command], number: int) -> None:
    """While files are written: then nothing is left beside the output."""
    found = command("safetensors")
    written = [at for at, what in enumerate(found.points) if what == "open"]
    for at in evenly(written, 4)[1:]:  # the first is the lock
        found.begin()
        ended = found.run((number, at))
        assert ended.code not in (0, 99) and "Traceback" not in ended.said, ended.said
        assert contents(found.place / "out") in (OLD, found.whole)
        assert [path.name for path in found.place.iterdir()] == ["out"]


@pytest.mark.parametrize("name, count", TRIED)
def test_a_full_disk(command: Callable[[str], Command], name: str, count: int) -> None:
    """Full from a point on: an error of one line, the old output in place, finished work alone beside it."""
    found = command(name)
    needing = [at for at, what in enumerate(found.points) if what in NEEDS_SPACE]
    for at in evenly(needing, count):
        found.begin()
        ended = found.run((FULL, at))
        error = ended.said.splitlines()[-1]
        assert ended.code == 1 and error.startswith("Error: ") and "Traceback" not in ended.said, ended.said
        assert "disk is full" in error or "No space left" in error
        assert contents(found.place / "out") == OLD
        assert {path.name for path in found.place.iterdir()} <= {"out", ".out.work"}
        found.rerun()
