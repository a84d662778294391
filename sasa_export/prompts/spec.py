"""How a data set is named on the command line: `name:PATH,option=value,option=value+value`, or a bare path."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sasa_export.errors import DataError
from sasa_export.prompts.record import Record

OPTIONS = re.compile(r"((?:,[a-z_]+=[^,/\\]*)*)$")  # at the end, so that a path may hold commas
NAME = re.compile(r"([A-Za-z0-9_-]{2,}):(.*)", re.DOTALL)  # one letter before a colon is a drive
Chosen = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Option:
    """What a data set can be narrowed to: some of `values`, joined by `+`, or one where `several` is false.

    Case does not count, and - is as good as _. An alias stands for one or more values; "all" for all of them.
    """

    values: tuple[str, ...]
    default: tuple[str, ...]
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    several: bool = True

    def choose(self, name: str, given: str, spec: str) -> tuple[str, ...]:
        """The values that `given` names, in the order of `values`."""
        meant: dict[str, tuple[str, ...]] = {folded(value): (value,) for value in self.values}
        meant |= {folded(alias): values for alias, values in self.aliases.items()}
        if self.several:
            meant["all"] = self.values
        words = given.split("+") if self.several else [given]
        chosen: set[str] = set()
        for word in words:
            if folded(word) not in meant:
                raise DataError(f"{spec}: {name} is {word!r}; it must be one of {', '.join(self.values)}.")
            chosen |= set(meant[folded(word)])
        return tuple(value for value in self.values if value in chosen)


@dataclass(frozen=True)
class Loader:
    """A data set: `read` makes its records from a path and the values chosen of each option."""

    name: str
    read: Callable[[Path, Chosen], list[Record]]
    options: Mapping[str, Option] = field(default_factory=dict)


@dataclass(frozen=True)
class Spec:
    """A parsed spec; the loader reads `path`. `name` is None for a bare path."""

    text: str
    name: str | None
    path: Path
    options: Mapping[str, str]

    def chosen(self, loader: Loader) -> Chosen:
        """The values of all of the loader's options, given or default."""
        for name in self.options:
            if name not in loader.options:
                has = f"it has {', '.join(loader.options)}" if loader.options else "it has none"
                raise DataError(f"{self.text}: {loader.name} has no option {name!r}; {has}.")
        return {
            name: option.choose(name, self.options[name], self.text) if name in self.options else option.default
            for name, option in loader.options.items()
        }


def folded(word: str) -> str:
    return word.strip().casefold().replace("_", "-")


def parse(text: str, names: Iterable[str]) -> Spec:
    """Take a spec apart; `names` are the data sets there are. DataError where it names none of them, or no path."""
    found, named = OPTIONS.search(text), NAME.fullmatch(text)
    tail = found.group(1) if found else ""
    if named is None or named.group(1) not in names:
        if os.path.exists(text):  # a file may have colons and commas in its name
            named, tail = None, ""
        elif named is not None:
            raise DataError(f"{text}: there is no data set {named.group(1)!r}. Known are {', '.join(names)}.")
    path = (named.group(2) if named else text).removesuffix(tail)
    if not path.strip():
        raise DataError(f"{text!r} names no path. Write name:PATH, for example xstest:xstest_prompts.csv.")
    options: dict[str, str] = {}
    for item in tail.split(",")[1:]:
        name, _, value = item.partition("=")
        if name in options:
            raise DataError(f"{text}: the option {name!r} stands twice; join its values with +.")
        options[name] = value
    try:
        place = Path(path).expanduser()
    except (RuntimeError, ValueError):  # a user who is not there, or a name that none can have
        place = Path(path)
    return Spec(text, named.group(1) if named else None, place, options)
