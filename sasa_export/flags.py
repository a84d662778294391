"""OptionSet as one frozen dataclass, and the command line's flags made from it, one a field."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import click

from sasa_export.errors import SasaExportError


def option(default: Any, help: str, *, group: str = "Options", common: bool = False, **extra: Any) -> Any:
    """A field of a dataclass of options.

    Args:
        group: the heading in --help-all; `common`: whether --help shows it too.
        extra: `choices`, the values there are; `required`; `valid`, what a value must be, in words, and whether it is.
    """
    return field(default=default, metadata={"help": help, "group": group, "common": common, **extra})


def flag(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


class OptionSet:
    """A base of dataclasses of options: paths and numbers may be given as text, text as paths, one value in place of
    several."""

    def __post_init__(self) -> None:
        for name, kinds in kinds_of(type(self)).items():
            value = getattr(self, name)
            if tuple in kinds:
                value = tuple(map(str, (value,) if isinstance(value, str | os.PathLike) else value))
            elif isinstance(value, str) and Path in kinds:
                value = Path(value)
            elif isinstance(value, str) and kinds & {int, float}:  # or a word in a number's place
                with suppress(ValueError):
                    value = int(value) if int in kinds else float(value)
            elif isinstance(value, os.PathLike) and Path not in kinds:
                value = os.path.join(".", value)  # "llava" may be an alias, and "./llava" is none
            object.__setattr__(self, name, value)

    def check_default(self, *names: str, why: str) -> None:
        """Raise SasaExportError where one of the fields is set."""
        for entry in fields(self):  # type: ignore[arg-type]
            if entry.name in names and getattr(self, entry.name) != entry.default:
                raise SasaExportError(f"{flag(entry.name)} {why}. Leave it out.")


def kinds_of(options: type) -> dict[str, set[Any]]:
    """What each field of a dataclass may be: {int, str} of `int | str`, {tuple} of `tuple[str, ...]`."""
    hints = get_type_hints(options)
    parts = {name: get_args(hint) if isinstance(hint, UnionType) else (hint,) for name, hint in hints.items()}
    return {name: {get_origin(part) or part for part in of} for name, of in parts.items()}


def check_values(options: Any) -> None:
    """Raise SasaExportError where a field of a dataclass of options is none of its choices, or not `valid`."""
    for entry in fields(options):
        value = getattr(options, entry.name)
        choices = entry.metadata.get("choices")
        words, valid = entry.metadata.get("valid", ("", lambda value: True))
        if choices:
            words, valid = f"one of {', '.join(map(str, choices))}", choices.__contains__
        if value is not None and not valid(value):
            raise SasaExportError(f"{flag(entry.name)} is {value!r}; it must be {words}.")


def flags(options: type, *, required: bool = True) -> Callable[[Any], Any]:
    """A decorator that adds the flags of a dataclass of options to a Click command.

    Args:
        required: whether Click asks for what is `required`, which a group with commands of its own cannot let it do.
    """

    kinds = kinds_of(options)

    def decorate(command: Any) -> Any:
        for entry in reversed(fields(options)):
            about = {"help": entry.metadata["help"], **_click_type(entry, kinds[entry.name])}
            if entry.metadata.get("required"):
                about = {"help": about["help"], "type": about["type"], "required": required}
            command = click.option(flag(entry.name), entry.name, **about)(command)
        return command

    return decorate


def _click_type(entry: Any, kinds: set[Any]) -> dict[str, Any]:
    """What Click needs to know of a field's values."""
    about = entry.metadata
    if bool in kinds:
        return {"is_flag": True}
    if tuple in kinds:
        return {"multiple": True}
    value: Any = str if str in kinds else int if int in kinds else float
    if "choices" in about:
        value = click.Choice(about["choices"])
    elif Path in kinds:
        value = click.Path(path_type=Path)
    return {"type": value, "default": entry.default, "show_default": entry.default is not None}
