"""Options as frozen dataclasses. A field's metadata defines its Click flag; its type converts Python values too."""

import math
import os
from collections.abc import Callable
from dataclasses import field, fields
from typing import Any

import click

from sasa_export.errors import SasaExportError


class Number(click.FloatRange):
    """A number in a range. NaN is refused."""

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        found = super().convert(value, param, ctx)
        if math.isnan(found):
            self.fail(f"{value} is no number.", param, ctx)
        return found


class WordOr(click.ParamType):
    """A Click type that takes one fixed word, or any value of another type."""

    def __init__(self, word: str, other: click.ParamType) -> None:
        self.word, self.other, self.name = word, other, f"{word}|{other.name}"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if value == self.word:
            return value
        try:
            return self.other.convert(value, param, ctx)
        except click.BadParameter as error:
            self.fail(f"{error.message.rstrip('.')}, nor {self.word}.", param, ctx)


def option(default: Any, help: str, type: Any = click.STRING, **more: Any) -> Any:
    """Return a field for a dataclass of options.

    Args:
        type: the Click type that converts and checks values. Ignored where the default is a bool.
        more: further arguments of click.option: `multiple`, `required`, `hidden`.
    """
    more |= {"is_flag": True} if isinstance(default, bool) else {"type": type}
    if default is not None and not {"required", "multiple", "is_flag"} & set(more):
        more |= {"default": default, "show_default": True}
    return field(default=default, metadata={"help": help, "click": more})


def flag(name: str) -> str:
    """Return the command-line flag of a field."""
    return "--" + name.replace("_", "-")


class OptionSet:
    """The base class of options. Values are converted as on the command line: a path or number may be text, text may
    be a path, and a single value may replace a tuple. Raises SasaExportError where an option refuses its value."""

    def __post_init__(self) -> None:
        for entry in fields(self):  # type: ignore[arg-type]
            about, value = entry.metadata["click"], getattr(self, entry.name)
            if about.get("multiple"):
                value = tuple(map(str, (value,) if isinstance(value, str | os.PathLike) else value))
            elif value is not None and "type" in about:
                if isinstance(value, os.PathLike) and not isinstance(about["type"], click.Path):
                    value = os.path.join(".", value)  # "llava" could be an alias, "./llava" cannot
                try:
                    value = about["type"](value)
                except click.BadParameter as error:
                    raise SasaExportError(f"{flag(entry.name)} cannot be {value!r}: {error.message}") from None
            object.__setattr__(self, entry.name, value)

    def check_default(self, *names: str, why: str) -> None:
        """Raise SasaExportError where one of the named fields differs from its default."""
        for entry in fields(self):  # type: ignore[arg-type]
            if entry.name in names and getattr(self, entry.name) != entry.default:
                raise SasaExportError(f"{flag(entry.name)} {why}. Leave it out.")


def flags(options: type, *, required: bool = True) -> Callable[[Any], Any]:
    """Return a decorator that adds the flags of a dataclass of options to a Click command.

    Args:
        required: whether Click enforces required options. It must not for a group, whose subcommands run without them.
    """

    def decorate(command: Any) -> Any:
        for entry in reversed(fields(options)):
            about = {"help": entry.metadata["help"], **entry.metadata["click"]}
            about["required"] = required and about.get("required", False)
            command = click.option(flag(entry.name), entry.name, **about)(command)
        return command

    return decorate
