"""How a data set is named on the command line: `name:PATH,option=value,option=value+value`, or a bare path.

A bare path is a JSONL file of our own format, or a table by its name's end.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sasa_export.errors import DataError
from sasa_export.prompts.prompt import Prompt
from sasa_export.prompts.read import TABLES, folded

# One letter before a colon is a drive. Options stand at the end, so that a path may hold commas.
SPEC = re.compile(r"(?:([A-Za-z0-9_-]{2,}):)?(.*?)((?:,[a-z_]+=[^,/\\]*)*)", re.DOTALL)
WHOLE = re.compile("()(.*)()", re.DOTALL)  # a file may have colons and commas in its name
BARE = "jsonl"

Chosen = Mapping[str, tuple[str, ...]]  # the values chosen of each option


@dataclass(frozen=True)
class Option:
    """What a data set can be narrowed to: some of `values`, joined by `+`, or all of them. Without values, a text.

    Case does not count, and - is as good as _. Each value has its further names.
    """

    values: Mapping[str, Iterable[str]] = field(default_factory=dict)
    default: str = ""

    @classmethod
    def of(cls, values: str, default: str) -> Option:
        """One whose values have no further names."""
        return cls(dict.fromkeys(values.split(), ()), default)

    def choose(self, given: str) -> tuple[str, ...]:
        """The values that `given` names, in the order of `values`. DataError for one that does not exist."""
        if not self.values:
            return (given,)
        words = {folded(word) for word in given.split("+")}
        names = {name: {"all", *map(folded, (name, *further))} for name, further in self.values.items()}
        for word in words - set().union(*names.values()):
            raise DataError(f"{word!r} must be one of {', '.join(self.values)}.")
        return tuple(name for name, known in names.items() if words & known)


@dataclass(frozen=True)
class DataSet:
    """How a data set is read, and the options that narrow it down."""

    read: Callable[[Path, Chosen], Iterator[Prompt]]
    options: Mapping[str, Option] = field(default_factory=dict)


def parse(spec: str, known: Mapping[str, DataSet]) -> tuple[str, Path, Chosen]:
    """The data set, the path, and the chosen values of all of its options.

    DataError where the spec names none of the `known` data sets, no path, or no option.
    """
    match = (WHOLE if os.path.exists(spec) else SPEC).fullmatch(spec)
    assert match is not None  # both take anything
    name, path = match[1] or ("table" if match[2].lower().endswith(TABLES) else BARE), match[2]
    if name not in known:
        raise DataError(f"{spec}: there is no data set {name!r}. Known are {', '.join(known)}.")
    if not path.strip():
        raise DataError(f"{spec!r} names no path. Write name:PATH, for example xstest:xstest_prompts.csv.")
    options = known[name].options
    chosen = {option: options[option].choose(options[option].default) for option in options}
    for item in match[3].split(",")[1:]:
        option, _, value = item.partition("=")
        if option not in options:
            raise DataError(f"{spec}: {name} has no option {option!r}; it has {', '.join(options) or 'none'}.")
        try:
            chosen[option] = options[option].choose(value)
        except DataError as error:
            raise DataError(f"{spec}: {option} {error}") from None
    return name, Path(os.path.expanduser(path)), chosen
