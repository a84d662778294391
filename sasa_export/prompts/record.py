"""The record that every data set comes to."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from sasa_export.errors import DataError
from sasa_export.prompts.picture import open_picture
from sasa_export.prompts.prompt import Prompt

Record = Prompt  # what calibration takes, so that every data set serves it


class Names:
    """The names that a data set has used so far."""

    def __init__(self) -> None:
        self.first: dict[str, str] = {}

    def take(self, name: str, where: str) -> str:
        """`name`, once; DataError the second time. `where` says where it was found."""
        if name in self.first:
            raise DataError(f"{where} has the id {name!r}, which {self.first[name]} has already.")
        self.first[name] = where
        return name


def record(
    *,
    source: str,
    name: str,
    prompt: str,
    label: int,
    group: str,
    category: str,
    attack: str = "none",
    question: str = "",
    picture: Path | None = None,
    where: str = "",
) -> Record:
    """A record of the data set `source`; `where` names its place in an error about its picture."""
    return Record(
        name=name,
        prompt=prompt,
        label=label,
        group=group,
        channel="text" if picture is None else "picture",
        category=category,
        image=None if picture is None else partial(open_picture, picture, where),
        attack=attack,
        source=source,
        question=question,
        picture=picture,
    )
