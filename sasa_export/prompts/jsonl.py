"""Our own format: one JSON object a line, {"image": path or null, "prompt": text, "label": 0 or 1}.

Optional: "id", "group" (lines of one group are never parted), "category", "attack", and "question": what is asked,
where the prompt only accompanies a picture. Paths are relative to the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sasa_export.errors import DataError
from sasa_export.prompts.picture import pictured
from sasa_export.prompts.prompt import Prompt
from sasa_export.prompts.read import parsed, text_of
from sasa_export.prompts.spec import Chosen, Option

OPTIONS: dict[str, Option] = {}


def read(path: Path, chosen: Chosen) -> Iterator[Prompt]:
    """One prompt a line. DataError names the line that is wrong."""
    for number, line in enumerate(text_of(path).split("\n"), 1):  # JSON strings may hold other line separators
        if line.strip():
            where = f"{path}, line {number}"
            yield _prompt(parsed(line, where), f"line {number}", path.parent, where)


def _prompt(record: Any, name: str, directory: Path, where: str) -> Prompt:
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise DataError(f'{where} has no "prompt" string. A line is {{"image", "prompt", "label"}}.')
    label, image, question = record.get("label"), record.get("image"), record.get("question") or ""
    if type(label) is not int or label not in (0, 1):
        raise DataError(f"{where} has the label {repr(label)[:80]}; it must be 0 (harmless) or 1 (harmful).")
    if not isinstance(question, str):
        raise DataError(f'{where} has a "question" that is not a text.')
    if image is not None and not isinstance(image, str):
        raise DataError(f'{where} has an "image" that is neither a path nor null.')
    if image is None and not record["prompt"].strip():
        raise DataError(f"{where} has an empty prompt and no image.")
    return Prompt(
        name=name if record.get("id") is None else str(record["id"]),
        prompt=record["prompt"],
        label=label,
        group=str(record.get("group", name)),
        category=str(record.get("category", "none")),
        attack=str(record.get("attack", "none")),
        question=question,
        **({} if image is None else pictured(where, directory / image)),
    )
