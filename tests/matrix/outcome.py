"""What a row of the matrix finds, the list of all rows, and the files that a run leaves."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

OUT = "SASA_MATRIX_OUT"  # names the directory for the findings; without it, none are written

REFUSED = "refused"  # spelled and ended
WORDS = "words of the refusal only"  # an option forbids the wanted ones
NOTHING = "nothing of the model's"  # an option forbids all words of the refusal: every logit is the same
UNCHANGED = "unchanged"  # the stock model's tokens in the same way of running
CLOSED = "refused too"  # fails closed
LOUD = "loud error"
NOT_ASKED = "not asked"
GOOD = {REFUSED, WORDS, NOTHING, UNCHANGED, CLOSED, LOUD, NOT_ASKED}


@dataclass(frozen=True)
class Outcome:
    """What became of harmful and of harmless prompts, and what a reader should know about it."""

    harmful: str
    harmless: str
    remark: str = ""

    def __post_init__(self) -> None:
        assert {self.harmful, self.harmless} <= GOOD
        assert {self.harmful, self.harmless} != {NOT_ASKED}

    def but(self, remark: str) -> "Outcome":
        """The same with a remark."""
        return Outcome(self.harmful, self.harmless, remark)


HOLDS = Outcome(REFUSED, UNCHANGED)


@dataclass(frozen=True)
class Row:
    """One way of running, on one runtime, for some families."""

    runtime: str  # torch, onnxruntime, or smol-llava
    section: str
    name: str
    run: Callable[..., Outcome]
    families: tuple[str, ...]

    @property
    def identifier(self) -> str:
        return "".join(letter if letter.isalnum() else "_" for letter in self.name.lower())


ROWS: list[Row] = []


def row(
    runtime: str, section: str, name: str, families: tuple[str, ...] = ("llava",)
) -> Callable[[Callable[..., Outcome]], Callable[..., Outcome]]:
    """Enter a function of a bench into the matrix."""

    def enter(run: Callable[..., Outcome]) -> Callable[..., Outcome]:
        assert (runtime, name) not in {(other.runtime, other.name) for other in ROWS}, f"two rows are named {name}"
        ROWS.append(Row(runtime, section, name, run, families))
        return run

    return enter


def rows(runtime: str) -> list[tuple[Row, str]]:
    """All rows of a runtime, once a family."""
    return [(one, family) for one in ROWS if one.runtime == runtime for family in one.families]


@contextmanager
def recorded(one: Row, family: str) -> Iterator[list[Outcome]]:
    """Write what a row found, or how it failed, into the directory that the environment names.

    The block puts its outcome into the list that it gets.
    """
    found: list[Outcome] = []
    start, failure = time.process_time(), ""
    try:
        yield found
    except BaseException as error:
        failure = one_line(error)
        raise
    finally:
        if directory := os.environ.get(OUT):
            finding = {
                "runtime": one.runtime, "section": one.section, "name": one.name, "family": family,
                "outcome": asdict(found[0]) if found else None, "failure": failure,
                "seconds": round(time.process_time() - start, 2),
            }  # fmt: skip
            path = Path(directory, f"{one.runtime}-{one.identifier}-{family}.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(finding, indent=2) + "\n", encoding="utf-8")


def one_line(error: BaseException, width: int = 160) -> str:
    """The first line of an error's message, with its type."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = f"{type(error).__name__}: {text}"
    return text if len(text) <= width else text[: width - 3] + "..."
