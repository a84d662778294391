"""What a model says to a prompt, and how the answers of all prompts come about: batch by batch, resumable, shared."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from sasa_export.errors import EvaluateError
from sasa_export.probe.features import batches
from sasa_export.prompts.prompt import Prompt
from sasa_export.workers import Workers


@dataclass(frozen=True)
class Answer:
    """A greedy answer: `tokens` up to its end, the end token included. P(unsafe) is None for an unguarded model."""

    name: str
    tokens: tuple[int, ...]
    text: str
    unsafe_probability: float | None


class Model(Protocol):
    """A model that answers, whatever it runs on."""

    batch_size: int

    def answers(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """The answers to a batch."""

    def prepare(self, prompt: Prompt) -> object:
        """The model inputs of one prompt, for `judge` and `begin`."""

    def judge(self, inputs: object) -> None:
        """Run the prompt: the verdict is there, and so are the first logits."""

    def begin(self, inputs: object) -> None:
        """Give the first token of the answer."""


def answer_all(
    model: Callable[[], Model],
    prompts: Sequence[Prompt],
    batch_size: int,
    folder: Path,
    kind: str,
    workers: Workers,
    advance: Callable[[int], None],
) -> list[Answer]:
    """The answers to all prompts, in their order, in every process.

    Each answer goes into a file of the work folder, a JSON object a line, as soon as its batch is done, and a batch
    that is there already is not run again. The model is loaded when the first batch needs it.

    Args:
        kind: names the files: `kind.N.jsonl` of process N.
        advance: called with the number of prompts done since the last call.
    """
    done = {answer.name: answer for path in sorted(folder.glob(f"{kind}.*.jsonl")) for answer in read_answers(path)}
    mine = folder / f"{kind}.{workers.index}.jsonl"
    workers.wait()  # nobody appends while another still reads

    def run(rows: list[int]) -> list[Answer]:
        batch = [prompts[row] for row in rows]
        if all(prompt.name in done for prompt in batch):
            return [done[prompt.name] for prompt in batch]
        found = model().answers(batch)
        append(mine, found)
        return found

    cut = list(batches(prompts, batch_size))
    found = workers.spread(cut, run, lambda rows: advance(len(rows)))
    by_row = {
        row: answer for rows, answers in zip(cut, found, strict=True) for row, answer in zip(rows, answers, strict=True)
    }
    return [by_row[row] for row in range(len(prompts))]


def append(path: Path, answers: Sequence[Answer]) -> None:
    """Add answers to a file; a line that an interruption tore is ended first. EvaluateError where the disk is full."""
    lines = [json.dumps(asdict(answer), ensure_ascii=False) for answer in answers]
    try:
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        with path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + "\n".join(lines) + "\n")
    except OSError as error:
        raise EvaluateError(
            f"{path} could not be written ({error.strerror or error}). What is finished is kept there: free some space "
            "or correct the rights, and run the same command again."
        ) from None


def read_answers(path: Path) -> list[Answer]:
    """The answers of a file; a torn line is passed over."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            entry = json.loads(line)
            found.append(Answer(**{**entry, "tokens": tuple(entry["tokens"])}))
        except (ValueError, TypeError, KeyError):
            continue
    return found
