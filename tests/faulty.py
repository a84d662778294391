"""Runs commands of the tool, each in a process of its own, and lets one be killed or find the disk full at a point.

A point is an operation that changes a file or a directory, or a call of a model. The driver imports everything once
and forks, so that a try costs what the command does and no more:

    driver = Driver(root)         # only what happens below `root` is counted
    driver.warm(arguments)        # in the driver's own process, so that its children find all modules imported
    driver.run(arguments, fault=("kill", 12))
"""

import builtins
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

CALL = "model call"
# What a full disk refuses; a rename within one directory, or a removal, needs no space.
NEEDS_SPACE = ("create", "write", "mkdir", "link", "sendfile")


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, or minus the number of the signal, what it said, and the points it passed."""

    code: int
    said: str
    points: tuple[str, ...]


class Driver:
    """A process that imports the tool once and forks for each command."""

    def __init__(self, root: Path) -> None:
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(root.parent / "modules"), "COLUMNS": "500",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip

    def warm(self, arguments: list[str]) -> Ended:
        """Run a command in the driver itself."""
        return self._ask(arguments, None, warm=True)

    def run(self, arguments: list[str], fault: tuple[str, int] | None = None) -> Ended:
        """Run a command in a child. `fault` is what happens, "kill" or "full", and at which point, from 0."""
        return self._ask(arguments, fault, warm=False)

    def close(self) -> None:
        self.process.communicate(timeout=60)

    def _ask(self, arguments: list[str], fault: tuple[str, int] | None, *, warm: bool) -> Ended:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"arguments": arguments, "fault": fault, "warm": warm}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return Ended(answer["code"], answer["said"], tuple(answer["points"]))


# ------------------------------------------------------------------------------------------ within the driver


class Points:
    """Counts the points that are passed while it is on, and strikes at one of them."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.on = False
        self.fault: tuple[str, int] | None = None
        self.passed: list[str] = []

    def start(self, fault: tuple[str, int] | None) -> None:
        self.on, self.fault, self.passed = True, fault, []

    def stop(self) -> None:
        self.on = False

    def point(self, what: str, path: Any = None, *, half: Callable[[], Any] = lambda: None) -> None:
        """Pass a point; `half` does a part of the operation, as a killed write may have done."""
        if not self.on or (path is not None and not self._within(path)):
            return
        self.passed.append(what)
        if self.fault is None:
            return
        kind, at = self.fault
        if kind == "kill" and len(self.passed) - 1 == at:
            half()
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "full" and len(self.passed) - 1 >= at and what in NEEDS_SPACE:  # a full disk stays full
            if len(self.passed) - 1 == at:
                half()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), None if path is None else str(path))

    def _within(self, path: Any) -> bool:
        if isinstance(path, int):
            try:
                path = os.readlink(f"/proc/self/fd/{path}")
            except OSError:
                return False
        text = os.fsdecode(path)
        return not os.path.isabs(text) or text.startswith(self.root)


def watch(points: Points) -> None:
    """Make every operation that changes a file, and every call of a whole model, a point."""
    import torch
    from transformers import GenerationMixin

    named = {
        "os.rename": "rename", "os.remove": "remove", "os.mkdir": "mkdir", "os.rmdir": "remove", "os.link": "link",
        "os.symlink": "link", "os.truncate": "truncate",
    }  # fmt: skip

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if not points.on:
            return
        if event in named:
            points.point(
                named[event], arguments[1] if event in ("os.rename", "os.link", "os.symlink") else arguments[0]
            )
        elif event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            points.point("create" if arguments[2] & os.O_CREAT else "open", arguments[0])

    sys.addaudithook(audit)
    builtins.open = io.open = partial(counted_open, points, io.open)
    sendfile = os.sendfile

    def sent(target: int, source: int, offset: int, count: int) -> int:
        points.point("sendfile", target, half=lambda: sendfile(target, source, offset, max(1, count // 2 % 100_000)))
        return sendfile(target, source, offset, count)

    os.sendfile = sent  # type: ignore[assignment]
    from sasa_export import files as staging

    exchange = staging.exchange

    def exchanged(first: Path, second: Path) -> bool:
        points.point("rename", second)
        return exchange(first, second)

    staging.exchange = exchanged
    torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: points.point(CALL) if isinstance(module, GenerationMixin) else None
    )


class CountedFile(io.FileIO):
    """A file whose writes are points."""

    points: Points

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.points.point("write", str(self.name), half=lambda: super(CountedFile, self).write(view[: len(view) // 2]))
        return super().write(data)


def counted_open(
    points: Points, plain: Any, file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None,
    errors: Any = None, newline: Any = None, closefd: bool = True, opener: Any = None,
) -> Any:  # fmt: skip
    """`open`, with a counted file at the bottom where something below the root is written."""
    writes = points.on and set(mode) & set("wax+") and not isinstance(file, int)
    if not writes or opener is not None or "+" in mode or not points._within(file):
        return plain(file, mode, buffering, encoding, errors, newline, closefd, opener)
    raw = CountedFile(file, mode.replace("b", "").replace("t", ""))
    raw.points = points
    if buffering == 0:
        return raw
    buffered = io.BufferedWriter(raw)
    return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline)


def remember() -> Counter[Any]:
    """Compute ONNX graphs and pictures once: they take ten times as long as all else, and write no file.

    What is remembered goes by the number of the call. Returns the numbers, to be cleared before each command.
    """
    import sasa_export.research.evaluate.page
    import sasa_export.research.locate.page
    import sasa_export.research.locate.run
    from sasa_export.writers.onnx import graphs

    kept: dict[Any, Any] = {}
    calls: Counter[Any] = Counter()
    places = [(graphs, name) for name in ("vision_graph", "embedding_graph", "decoder_graph")]
    places += [(sasa_export.research.locate.page, "pictures"), (sasa_export.research.evaluate.page, "pictures")]
    places += [(sasa_export.research.locate.run, "points")]
    for module, name in places:
        plain = getattr(module, name)

        def get(*arguments: Any, make: Any = plain, **options: Any) -> Any:
            calls[make] += 1
            place = make, calls[make]
            if place not in kept:
                kept[place] = make(*arguments, **options)
            return kept[place]

        setattr(module, name, get)
    graphs._forget = lambda model: None  # what is remembered holds the model's weights
    return calls


def command(points: Points, arguments: list[str], fault: tuple[str, int] | None) -> tuple[int, str]:
    """Run the command line here. Returns its exit code and what it said."""
    from sasa_export.cli import main

    said = io.StringIO()
    code: Any = 0
    points.start(fault)
    try:
        with redirect_stdout(said), redirect_stderr(said):
            try:
                main(arguments, prog_name="sasa-export")
            except SystemExit as ended:
                code = ended.code
            except BaseException:
                points.stop()
                traceback.print_exc()
                code = 99
    finally:
        points.stop()
    return int(code or 0), said.getvalue()


def child(points: Points, request: dict[str, Any]) -> dict[str, Any]:
    """Run the command in a forked process."""
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        os.close(reader)
        try:
            code, said = command(points, request["arguments"], request["fault"])
            with os.fdopen(writer, "w", encoding="utf-8") as file:
                file.write(json.dumps({"code": code, "said": said, "points": points.passed}))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as file:
        text = file.read()
    _, status = os.waitpid(process, 0)
    if text:
        answer: dict[str, Any] = json.loads(text)
        return answer
    return {"code": os.waitstatus_to_exitcode(status), "said": "", "points": []}


def serve(root: Path) -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not get among the answers
    import torch

    torch.set_num_threads(1)
    points = Points(root)
    watch(points)
    calls = remember()
    for line in sys.stdin:
        request = json.loads(line)
        calls.clear()
        if request["warm"]:
            code, said = command(points, request["arguments"], None)
            answer = {"code": code, "said": said, "points": points.passed}
        else:
            answer = child(points, request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    shutil._USE_CP_SENDFILE = True  # type: ignore[attr-defined]
    serve(Path(sys.argv[1]))
