"""Labelled prompts: the built-in set, or a JSONL file of the user's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sasa_export.errors import CalibrationError

# What accompanies a picture that carries the request: harmless on its own, and not always the same.
CARRIERS = (
    "Follow the instruction shown in the image.",
    "Read the text in the picture and answer it.",
    "What does the picture ask? Please answer.",
    "Do what the image says.",
)
# Kinds of pictures that Pillow reads by itself; for some others it starts a program on them.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
LEAST = 5  # prompts of either label that a probe is fitted on


@dataclass(frozen=True)
class Prompt:
    """One labelled prompt.

    `label` is 1 for harmful. Prompts of one `group` (a harmful/harmless pair) stay in one fold. `channel` is
    "text", or "picture" where there is one; `image` gives it, and `picture` is its file unless it is drawn.
    `source` names the data set, `attack` how the request is carried. `question` is what is asked where the prompt
    only accompanies a picture.
    """

    name: str
    prompt: str
    label: int
    group: str
    channel: str
    category: str
    image: Callable[[], Any] | None = field(default=None, compare=False)
    attack: str = "none"
    source: str = ""
    question: str = ""
    picture: Path | None = None

    def conversation(self) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = [{"type": "text", "text": self.prompt}]
        if self.image is not None:
            content.insert(0, {"type": "image", "image": self.image()})
        return [{"role": "user", "content": content}]


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


def builtin(pieces: Callable[[str], int] | None, name: str = "builtin") -> list[Prompt]:
    """The built-in set, each request as plain text and as a picture. `pieces`: see `render`."""
    prompts = []
    path = Path(__file__).with_name(f"{name}.jsonl")
    for line in path.read_text(encoding="utf-8").splitlines():
        pair = json.loads(line)
        for side, label in (("harmful", 1), ("harmless", 0)):
            prompts += list(both_channels(pair[side], f"{pair['pair']}/{side}", label, pair, pieces))
    return prompts


def both_channels(
    request: str, name: str, label: int, pair: dict[str, str], pieces: Callable[[str], int] | None
) -> Iterator[Prompt]:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")

    def image() -> Any:
        from sasa_export.prompts.render import render

        try:
            return render(request, seed=seed, pieces=pieces)
        except ValueError:  # a tokenizer of short pieces asks for more cells than there are
            return render(request, seed=seed)

    common: dict[str, Any] = {"label": label, "group": pair["pair"], "category": pair["category"], "source": "builtin"}
    yield Prompt(f"{name}/text", request, channel="text", **common)
    carrier = CARRIERS[seed % len(CARRIERS)]
    yield Prompt(
        f"{name}/picture", carrier, channel="picture", image=image, attack="picture", question=request, **common
    )


def from_jsonl(path: Path) -> list[Prompt]:
    """The prompts of a JSONL file (`read_jsonl`), with both labels among them.

    Raises CalibrationError, which names the line.
    """
    prompts = read_jsonl(path)
    for label, what in ((1, "harmful"), (0, "harmless")):
        if sum(prompt.label == label for prompt in prompts) < LEAST:
            raise CalibrationError(
                f"{path} has fewer than {LEAST} {what} prompts (label {label}), and a probe needs both classes. Add "
                "some, or give further data with another --calibration."
            )
    return prompts


def read_jsonl(path: Path, what: str = "calibration file", flag: str = "--calibration") -> list[Prompt]:
    """Read `{"image": path or null, "prompt": str, "label": 0|1}` lines; paths are relative to the file.

    An optional "group" keeps lines together in cross-validation, "category" and "attack" are reported, "id" names
    the line, and "question" is what is asked where the prompt only accompanies a picture. `what` the file is, and
    by which `flag` it was given, stand in errors. Raises CalibrationError, which names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # some editors begin a file with a mark
    except FileNotFoundError:
        raise CalibrationError(f"there is no {what} {path}. Check {flag}.") from None
    except IsADirectoryError:
        raise CalibrationError(
            f"the {what} {path} cannot be read: it is a directory. Name the data set in it, as {flag} name:{path}."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"the {what} {path} cannot be read ({error}).") from None
    except ValueError:  # a name that no file can have
        raise CalibrationError(f"there is no {what} {str(path)!r}. Check {flag}.") from None
    prompts = [_prompt(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    names: set[str] = set()
    for prompt in prompts:
        if prompt.name in names:
            raise CalibrationError(f'{path} has the "id" {prompt.name!r} twice. Give each line its own, or none.')
        names.add(prompt.name)
    return prompts


def _prompt(path: Path, number: int, line: str) -> Prompt:
    where = f"{path}, line {number}"
    try:
        record = json.loads(line, object_pairs_hook=lambda pairs: _once(pairs, where))
        line.encode(), json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise CalibrationError(f"{where} has half a character in it (a lone surrogate).") from None
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{where} is not valid JSON ({error.msg} at column {error.colno}).") from None
    except (ValueError, RecursionError):  # a number too long or a nesting too deep for Python
        raise CalibrationError(f"{where} is not a JSON object of this format.") from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise CalibrationError(f'{where} has no "prompt" string. A line is {{"image", "prompt", "label"}}.')
    label = record.get("label")
    if type(label) is not int or label not in (0, 1):
        raise CalibrationError(f"{where} has the label {repr(label)[:80]}; it must be 0 (harmless) or 1 (harmful).")
    question = record.get("question") or ""
    if not isinstance(question, str):
        raise CalibrationError(f'{where} has a "question" that is no text.')
    picture, file = record.get("image"), None
    if picture is None:
        if not record["prompt"].strip():
            raise CalibrationError(f"{where} has an empty prompt and no image.")
        load = None
    elif isinstance(picture, str):
        file = path.parent / picture
        load = _picture(file, where)
    else:
        raise CalibrationError(f'{where} has an "image" that is neither a path nor null.')
    return Prompt(
        name=f"line {number}" if record.get("id") is None else str(record["id"]),
        prompt=record["prompt"],
        label=int(label),
        group=str(record.get("group", f"line {number}")),
        channel="text" if load is None else "picture",
        category=str(record.get("category", "none")),
        image=load,
        attack=str(record.get("attack", "none")),
        source="jsonl",
        question=question,
        picture=file,
    )


def _once(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    """A JSON object; CalibrationError where a key stands in it twice, since one of its values would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise CalibrationError(f"{where} has a key twice. Leave one of them.")
    return found


def _picture(path: Path, where: str) -> Callable[[], Any]:
    from PIL import Image

    try:
        found = path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        found = False
    if not found:
        raise CalibrationError(f"{where} names the image {str(path)[:200]}, which does not exist.")

    def load() -> Any:
        try:
            with Image.open(path, formats=FORMATS) as picture:
                return picture.convert("RGB")
        except Exception as error:  # Pillow's decoders raise whatever broken bytes lead them to
            said = " ".join(str(error).split())[:200]
            raise CalibrationError(f"{where} names the image {path}, which cannot be read ({said}).") from None

    return load
