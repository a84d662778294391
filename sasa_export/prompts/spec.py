"""How a data set is named on the command line: `name:PATH,option=value,option=value+value`, or a bare path."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sasa_export.errors import DataError

# One letter before a colon is a drive. Options stand at the end, so that a path may hold commas.
SPEC = re.compile(r"(?:([A-Za-z0-9_-]{2,}):)?(.*?)((?:,[a-z_]+=[^,/\\]*)*)", re.DOTALL)
BARE = "jsonl"  # what a bare path is

Chosen = Mapping[str, tuple[str, ...]]  # the values chosen of each option


@dataclass(frozen=True)
class Option:
    """What a data set can be narrowed to: some of `values`, joined by `+`, or all of them.

    Case does not count, and - is as good as _. An alias stands for one or more values.
    """

    values: tuple[str, ...]
    default: tuple[str, ...]
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def choose(self, given: str) -> tuple[str, ...]:
        """The values that `given` names, in the order of `values`. DataError for one that does not exist."""
        meant = {"all": self.values} | {folded(value): (value,) for value in self.values}
        meant |= {folded(alias): values for alias, values in self.aliases.items()}
        words = [folded(word) for word in given.split("+")]
        for word in words:
            if word not in meant:
                raise DataError(f"{word!r} must be one of {', '.join(self.values)}.")
        return tuple(value for value in self.values if any(value in meant[word] for word in words))


def folded(word: str) -> str:
    """A word as options compare it."""
    return word.strip().casefold().replace("_", "-")


def parse(spec: str, known: Mapping[str, Mapping[str, Option]]) -> tuple[str, Path, Chosen]:
    """The data set, the path, and the chosen values of all of its options.

    Args: known: the options of each data set. DataError where the spec names no data set, no path, or no option.
    """
    match = SPEC.fullmatch(spec)
    if match is None or os.path.exists(spec):  # a file may have colons and commas in its name
        return BARE, Path(spec), {}
    name, path = match[1] or BARE, match[2]
    if name not in known:
        raise DataError(f"{spec}: there is no data set {name!r}. Known are {', '.join(known)}.")
    if not path.strip():
        raise DataError(f"{spec!r} names no path. Write name:PATH, for example xstest:xstest_prompts.csv.")
    options = known[name]
    chosen = {option: options[option].default for option in options}
    for item in match[3].split(",")[1:]:
        option, _, value = item.partition("=")
        if option not in options:
            raise DataError(f"{spec}: {name} has no option {option!r}; it has {', '.join(options) or 'none'}.")
        try:
            chosen[option] = options[option].choose(value)
        except DataError as error:
            raise DataError(f"{spec}: {option} {error}") from None
    return name, Path(os.path.expanduser(path)), chosen
