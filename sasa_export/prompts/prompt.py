"""The common form of labelled prompts, and their conversion to model inputs."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sasa_export.manifest import digest


@dataclass(frozen=True)
class Prompt:
    """One labelled prompt.

    `label` is 1 for harmful, 0 for harmless. Cross-validation keeps a `group` in one fold. `channel` is "text" or
    "picture". `image` returns the picture in RGB; `picture` is its file, if it comes from one.
    `attack` names the form of the request, `source` the data set. `question` is the actual request if `prompt` only
    accompanies a picture or contains more text. `before` holds the earlier turns as (role, text) pairs; `setting`
    names their type. `picture_turn` is the index of the picture's turn among the user's turns; -1 is the prompt itself.
    The picture precedes the turn's text, or follows it with `picture_last`. `kind` is the prompt's style or origin;
    choices are judged on unseen kinds. A `borderline` prompt is harmless, but sounds harmful.
    """

    name: str
    prompt: str
    label: int
    group: str
    channel: str = "text"
    category: str = "none"
    image: Callable[[], Any] | None = field(default=None, compare=False)
    attack: str = "none"
    source: str = ""
    question: str = ""
    picture: Path | None = None
    before: tuple[tuple[str, str], ...] = ()
    setting: str = "alone"
    picture_turn: int = -1
    picture_last: bool = False
    kind: str = ""
    borderline: bool = False

    def conversation(self) -> list[dict[str, Any]]:
        """Return the prompt as a list of chat messages."""
        turns = (*self.before, ("user", self.prompt))
        messages: list[dict[str, Any]] = [
            {"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns
        ]
        if self.image is not None:
            asking = [message["content"] for message in messages if message["role"] == "user"]
            turn = asking[self.picture_turn]
            turn.insert(len(turn) if self.picture_last else 0, {"type": "image", "image": self.image()})
        return messages


def asked(prompt: Prompt) -> str:
    """Return the actual request of a prompt: its `question`, or else its text."""
    return prompt.question or prompt.prompt


def digest_of(prompts: Sequence[Prompt]) -> str:
    """Return a SHA-256 of the prompts and their pictures. The order counts."""
    found = hashlib.sha256()
    for prompt in prompts:
        more = prompt.picture_turn, prompt.picture_last, prompt.kind, prompt.question, prompt.borderline
        told = (prompt.name, prompt.prompt, prompt.label, prompt.group, prompt.before, *more)
        found.update(repr(told).encode())
        if prompt.picture is not None:
            found.update(digest(prompt.picture).encode())
        elif isinstance(prompt.image, partial):  # hash the arguments: drawing thousands takes a minute
            found.update(repr((prompt.image.func.__name__, prompt.image.args)).encode())
    return found.hexdigest()


def encode(processor: Any, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Return one padded batch of model inputs."""
    return dict(
        processor.apply_chat_template(
            [prompt.conversation() for prompt in prompts],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"padding": True, "return_tensors": "pt"},
        )
    )


def encoded(processor: Any, prompt: Prompt) -> dict[str, Any]:
    """Return the inputs of a single prompt as numpy arrays."""
    return {name: tensor.numpy() for name, tensor in encode(processor, [prompt]).items()}


def batches(prompts: Sequence[Prompt], batch_size: int) -> Iterator[list[int]]:
    """Yield row numbers per batch. Each batch has one channel and prompts of similar length, to limit padding."""
    for channel in sorted({prompt.channel for prompt in prompts}):
        rows = [row for row, prompt in enumerate(prompts) if prompt.channel == channel]
        rows.sort(key=lambda row: sum(len(text) for _, text in (*prompts[row].before, ("", prompts[row].prompt))))
        yield from (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))
