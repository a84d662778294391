"""The one form that all labelled prompts have, and how they become model inputs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """One labelled prompt.

    `label` is 1 for harmful, 0 for harmless. Prompts of one `group` stay in one fold of a cross-validation. `channel`
    is "text", or "picture" where there is one: `image` gives it in RGB, and `picture` is its file unless it is drawn.
    `attack` says how the request is carried, `source` names the data set. `question` is what is asked, where the
    prompt only accompanies a picture. `before` holds the turns that go before it, each a role and its text, and
    `setting` names what they are; the picture stands in the prompt's own turn, or in the first of the user's. `kind`
    is its style or origin: a choice is judged on kinds that were left out. A `borderline` one is harmless, but sounds
    harmful.
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
    picture_first: bool = False
    kind: str = ""
    borderline: bool = False

    def conversation(self) -> list[dict[str, Any]]:
        """The prompt as a chat, the picture before the text of its turn."""
        turns = (*self.before, ("user", self.prompt))
        messages: list[dict[str, Any]] = [
            {"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns
        ]
        if self.image is not None:
            asking = [message["content"] for message in messages if message["role"] == "user"]
            asking[0 if self.picture_first else -1].insert(0, {"type": "image", "image": self.image()})
        return messages


def asked(prompt: Prompt) -> str:
    """What a prompt asks: its question, or its text where that is the question."""
    return prompt.question or prompt.prompt


def encode(processor: Any, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """One padded batch of model inputs."""
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
    """The inputs of one prompt alone, in numpy."""
    return {name: tensor.numpy() for name, tensor in encode(processor, [prompt]).items()}


def batches(prompts: Sequence[Prompt], batch_size: int) -> Iterator[list[int]]:
    """Row numbers, batch by batch: channels apart and short prompts together, so that little is padded."""
    for channel in sorted({prompt.channel for prompt in prompts}):
        rows = [row for row, prompt in enumerate(prompts) if prompt.channel == channel]
        rows.sort(key=lambda row: sum(len(text) for _, text in (*prompts[row].before, ("", prompts[row].prompt))))
        yield from (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))
