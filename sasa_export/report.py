"""Telling the user what happens: steps, progress and checks. The library is silent unless it is given a Console."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sasa_export.errors import VerifyError

PAUSE = 30.0  # seconds between two lines of progress where there is no terminal


@dataclass(frozen=True)
class Check:
    """One check of a written directory: `name` says what should hold, `detail` what was measured.

    `passed` is None where it could not be checked, and `detail` then says why.
    """

    name: str
    passed: bool | None
    detail: str


class Silent:
    """Says nothing."""

    def step(self, stage: str, text: str) -> None:
        """One stage is done, or has something to say."""

    def warn(self, text: str) -> None:
        """Something the user should know before relying on the result."""

    def check(self, passed: bool | None, name: str, detail: str) -> None:
        """One line of verification."""

    @contextmanager
    def bar(self, total: int, label: str) -> Iterator[Callable[[int], None]]:
        """A progress bar; the value advances it."""
        yield lambda count: None


class Console(Silent):
    """Writes to standard error with rich, so that standard output stays for results."""

    def __init__(self) -> None:
        from rich.console import Console as RichConsole
        from rich.markup import escape

        self.escape = escape
        self.console: Any = RichConsole(stderr=True, highlight=False)

    def step(self, stage: str, text: str) -> None:
        self.console.print(f"[bold]{stage:<10}[/bold]{self.escape(text)}", soft_wrap=True)

    def warn(self, text: str) -> None:
        self.console.print(f"[yellow]{'warning':<10}{self.escape(text)}[/yellow]", soft_wrap=True)

    def check(self, passed: bool | None, name: str, detail: str) -> None:
        mark = {True: "[green]✓[/green]", False: "[red]✗[/red]", None: "[yellow]–[/yellow]"}[passed]
        self.console.print(f"{'':<10}{mark} {self.escape(name)}: {self.escape(detail)}", soft_wrap=True)

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
        """Progress in a log file: a line now and then, with the time that is left at this pace."""
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
    """Report the checks. VerifyError where one failed."""
    for check in checks:
        report.check(check.passed, check.name, check.detail)
    failed = [check for check in checks if check.passed is False]
    if failed:
        raise VerifyError(
            f"{len(failed)} of {len(checks)} checks failed ({failed[0].name}: {failed[0].detail}), "
            "so nothing was written."
        )


def quiet() -> None:
    """Keep the libraries' own notices out of ours, and their progress bars but those of downloads. They read this when
    they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
