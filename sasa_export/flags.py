"""Settings as one frozen dataclass, and the command line's flags made from it: one a field, with its help and default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field, fields
from pathlib import Path
from typing import Any

import click


def option(default: Any, help: str, *, group: str = "Options", common: bool = False, **extra: Any) -> Any:
    """A field of a settings dataclass.

    Args:
        group: the heading in --help; `common`: shown there, and not in --help-all alone.
        extra: `choices`, the values there are; `word`, which may stand in a number's place; `required`.
    """
    return field(default=default, metadata={"help": help, "group": group, "common": common, **extra})


class NumberOr(click.ParamType):
    """A whole number, or one word in its place."""

    def __init__(self, word: str) -> None:
        self.word = word
        self.name = f"integer|{word}"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int | str:
        if value == self.word:
            return self.word
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a whole number nor {self.word!r}.", param, context)


def flags(settings: type) -> Callable[[Any], Any]:
    """A decorator that adds the flags of a settings dataclass to a Click command."""

    def decorate(command: Any) -> Any:
        for entry in reversed(fields(settings)):
            command = click.option("--" + entry.name.replace("_", "-"), entry.name, **_kind(entry))(command)
        return command

    return decorate


def _kind(entry: Any) -> dict[str, Any]:
    """What Click needs to know of a field."""
    kind: dict[str, Any] = {"help": entry.metadata["help"], "default": entry.default}
    shown = entry.default not in (None, ()) and not entry.metadata.get("required")
    if isinstance(entry.default, bool):
        return {**kind, "is_flag": True}
    if entry.metadata.get("required"):
        kind.pop("default")
    if "choices" in entry.metadata:
        kind["type"] = click.Choice(entry.metadata["choices"])
    elif "word" in entry.metadata:
        kind["type"] = NumberOr(entry.metadata["word"])
    elif "tuple" in str(entry.type):
        kind |= {"multiple": True, "default": None}
    elif "Path" in str(entry.type):
        kind["type"] = click.Path(path_type=Path)
    elif "int" in str(entry.type):
        kind["type"] = click.INT
    elif "float" in str(entry.type):
        kind["type"] = click.FLOAT
    return {**kind, "show_default": shown}
