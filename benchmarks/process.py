"""Time and memory of a command in a process of its own."""

from __future__ import annotations

import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass

import click
import psutil  # type: ignore[import-untyped]

LOOK = 0.02  # seconds between two looks at the memory


@dataclass(frozen=True)
class Process:
    """What a process took: seconds, and peaks in bytes of what it and its children hold themselves and of all that
    they have in memory, with the files that the system maps."""

    seconds: float
    own: int
    resident: int


def run_process(command: list[str]) -> Process:
    """Run a command to its end; its errors end the benchmark."""
    start, own, resident = time.perf_counter(), 0, 0
    with tempfile.TemporaryFile() as said:
        process = psutil.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            sizes = [_memory(one) for one in (process, *process.children(recursive=True))]
            now = [sum(column) for column in zip(*sizes, strict=True)]
            own, resident = max(own, now[0]), max(resident, now[1])
            with suppress(psutil.TimeoutExpired):
                process.wait(LOOK)
        if process.returncode:
            said.seek(0)
            raise click.ClickException(said.read().decode(errors="replace")[-3000:])
    return Process(time.perf_counter() - start, own, resident)


def _memory(process: psutil.Process) -> tuple[int, int]:
    try:
        sizes = process.memory_info()
    except psutil.Error:  # it has ended
        return 0, 0
    return sizes.rss - getattr(sizes, "shared", 0), sizes.rss
