"""Our own format: one JSON object a line, {"image": path or null, "prompt": text, "label": 0 or 1}.

Optional: "id", "group" (lines of one group are never parted), "category", "attack", and "question": what is asked,
where the prompt only accompanies a picture. Paths are relative to the file, and may lead anywhere: the file is yours.
"""

from __future__ import annotations

from pathlib import Path

from sasa_export.prompts.prompt import read_jsonl
from sasa_export.prompts.record import Record
from sasa_export.prompts.spec import Chosen, Loader

NAME = "jsonl"


def read(path: Path, chosen: Chosen) -> list[Record]:
    """One record a line. CalibrationError names the line that is wrong."""
    return read_jsonl(path)


LOADER = Loader(NAME, read)
