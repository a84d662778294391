"""Messages to the user: steps, progress and checks. The library prints nothing unless it is given a Console."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sasa_export.errors import VerifyError

PAUSE = 30.0  # seconds between two progress lines in a log file


@dataclass(frozen=True)
class Check:
    """One check of a written directory: `name` states the requirement, `detail` the measurement.

    `passed` is None where the check could not run. `detail` then gives the reason.
    """

    name: str
    passed: bool | None
    detail: str


class Silent:
    """A reporter that prints nothing, and the base class of Console."""

    def step(self, stage: str, text: str) -> None:
        """Report the result of a stage, or a message from it."""

    def warn(self, text: str) -> None:
        """Warn the user of something to know before relying on the result."""

    def check(self, passed: bool | None, name: str, detail: str) -> None:
        """Report one check of the verification."""

    @contextmanager
    def bar(self, total: int, label: str) -> Iterator[Callable[[int], None]]:
        """Show a progress bar. Yield a function that advances it by a count."""
        yield lambda count: None


class Console(Silent):
    """Writes to standard error with rich, so that standard output stays for results."""

    def __init__(self) -> None:
        from rich.console import Console as RichConsole

        self.console: Any = RichConsole(stderr=True, highlight=False, markup=False)

    def step(self, stage: str, text: str) -> None:
        self.console.print(f"{stage:<10}", style="bold", end="")
        self.console.print(text, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.console.print(f"{'warning':<10}{text}", style="yellow", soft_wrap=True)

    def check(self, passed: bool | None, name: str, detail: str) -> None:
        mark, style = {True: ("✓", "green"), False: ("✗", "red"), None: ("–", "yellow")}[passed]
        self.console.print(f"{'':<10}{mark} ", style=style, end="")
        self.console.print(f"{name}: {detail}", soft_wrap=True)

    @contextmanager
    def bar(self, total: int, label: str) -> Iterator[Callable[[int], None]]:
        if not self.console.is_terminal:
            yield self._lines(total, label)
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(f"{label:<10}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(label, total=total)
            yield lambda count: progress.advance(task, count)

    def _lines(self, total: int, label: str) -> Callable[[int], None]:
        """Return a function that logs progress for a log file: a line every PAUSE seconds, with the time left."""
        start = said = time.monotonic()
        done = 0

        def advance(count: int) -> None:
            nonlocal done, said
            done, now = done + count, time.monotonic()
            if 0 < done < total and now - said >= PAUSE:
                said = now
                left = (now - start) / done * (total - done)
                self.step("", f"{label}: {done} of {total}, about {left / 60:.0f} min left")

        return advance


def all_passed(checks: Sequence[Check], report: Silent) -> None:
    """Report the checks. Raise VerifyError where one failed."""
    for check in checks:
        report.check(check.passed, check.name, check.detail)
    failed = [check for check in checks if check.passed is False]
    if failed:
        raise VerifyError(
            f"{len(failed)} of {len(checks)} checks failed ({failed[0].name}: {failed[0].detail}), "
            "so nothing was written."
        )


def quiet() -> None:
    """Silence the notices of other libraries, and all progress bars except those of downloads. Call this before the
    libraries are imported: they read these variables then."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
