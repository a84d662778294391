"""Runs a command of the tool in a fork, and lets it be killed or find the disk full at a point.

A point is an operation that changes a file or a directory below a root, as Python's audit events tell. A fork begins
with everything imported, so that a try costs what the command does and no more.
"""

import errno
import json
import os
import signal
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The audit event of each operation, and which of its arguments is the path that changes.
CHANGES = {"os.rename": 1, "os.link": 1, "os.mkdir": 0, "os.remove": 0, "os.rmdir": 0, "open": 0}
NEEDS_SPACE = ("os.link", "os.mkdir", "open")  # a rename or a removal needs none


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, or minus the number of the signal, what it said, and the points it passed."""

    code: int
    said: str
    points: list[str]


def run(arguments: list[str], root: Path, log: Path, fault: tuple[str, int] | None = None) -> Ended:
    """Run a command in a fork. `fault` is what happens, "kill" or "full", and at which point, from 0."""
    points = log.with_suffix(".json")
    points.write_text("[]")
    process = os.fork()
    if not process:
        code = 99
        try:
            code = _command(arguments, root, log, points, fault)
        finally:
            os._exit(code)
    _, status = os.waitpid(process, 0)
    return Ended(os.waitstatus_to_exitcode(status), log.read_text(), json.loads(points.read_text()))


def _command(arguments: list[str], root: Path, log: Path, points: Path, fault: tuple[str, int] | None) -> int:
    """Run the command line here, with the fault, and return its exit code."""
    from sasa_export.cli import main

    passed: list[str] = []
    kind, at = fault or ("", 0)

    def audit(event: str, details: tuple[Any, ...]) -> None:
        if event not in CHANGES or not os.path.abspath(os.fsdecode(details[CHANGES[event]])).startswith(str(root)):
            return
        if event == "open" and not details[2] & os.O_CREAT:
            return
        passed.append(event)
        if kind == "kill" and len(passed) > at:
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "full" and len(passed) > at and passed[-1] in NEEDS_SPACE:  # a full disk stays full
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(details[0]))

    with log.open("w", buffering=1) as said, redirect_stdout(said), redirect_stderr(said):
        sys.addaudithook(audit)
        try:
            main(arguments, prog_name="sasa-export")
        except SystemExit as ended:
            return int(ended.code or 0)
        except BaseException:
            traceback.print_exc()
            return 99
        finally:
            os.write(os.open(points, os.O_WRONLY), json.dumps(passed).encode())
    return 0
