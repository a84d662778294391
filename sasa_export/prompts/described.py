"""Data sets described by a file each, sets/NAME.toml: where a set's tables lie, and what becomes of a record.

    root, file      folders below the user's path, and names of a table: the first that exists is read
    records         the key of the list of records, where the table is one object; lines: it is one record a line
    prompt, name, group, category, attack, question, kind    texts of a Prompt, with columns in braces: "{Question}"
    image           files below the root, the first that exists is the picture; [] for none; or the column that has it
    label           0 or 1, or the column that says so; borderline: true, likewise
    where           regular expressions by column; a record that does not match is left out
    keys            the only columns that there may be

An option's values hold what they change of that, and further names: `also`. An option without values takes a text, such
as a column's name. In braces, `{a|b}` is the first column that has a text, `{a|}` may be empty, `{a.b}` is the entry b
of a. Known are also the values of options, the named groups of `where`, and of a record its `#key` or number, `#place`
in the table, `#nth` of its category, and `#none`. Sets without pictures have the option `as`.
"""

from __future__ import annotations

import itertools
import os
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

from sasa_export.errors import DataError
from sasa_export.prompts.builtin_sets import CARRIERS, drawn
from sasa_export.prompts.picture import pictured, unmarked
from sasa_export.prompts.prompt import Prompt
from sasa_export.prompts.read import entry, records
from sasa_export.prompts.render import GRID, fits
from sasa_export.prompts.spec import Chosen, Option
from sasa_export.report import Silent

DEFAULTS: dict[str, Any] = {"root": ["."], "file": [], "where": {}}
DEFAULTS |= {"name": "{#key}", "group": "{#key}", "category": "none", "attack": "none", "question": ""}
DEFAULTS |= {"kind": "", "borderline": False}
AS = {"default": ["text"], "text": {}, "picture": {"drawn": True, "attack": "typographic"}}
SAYS = {"1": 1, "true": 1, "harmful": 1, "unsafe": 1, "0": 0, "false": 0, "harmless": 0, "safe": 0}

Way = dict[str, Any]  # a description as the chosen values change it; under "words" what templates know beside columns


@dataclass(frozen=True)
class DataSet:
    """A described data set: its `base`, and the options that change it."""

    name: str
    base: Mapping[str, Any]
    options: Mapping[str, Option]

    def read(self, path: Path, chosen: Chosen, report: Silent, *, labelled: bool = True) -> Iterator[Prompt]:
        """One prompt a record and way of asking it. `path` is a table, the set's directory, or an id of the hub."""
        tables: dict[Path, list[Way]] = {}
        ways = [way if labelled else way | {"label": 0} for way in self._ways(chosen)]
        # Where ways differ in their table, a path that is a file is meant for those that have one of its name.
        ways = [way for way in ways if path.name in map(os.path.basename, way["file"])] or ways
        if path.is_file() and len({tuple(way["file"]) for way in ways}) > 1:
            raise DataError(
                f"{path} is one file, and {self.name} has several. Name its directory, or fewer by options."
            )
        for way in ways:
            way["at"], table = (path, path) if "hub" in way else _table(path, way)
            tables.setdefault(table, []).append(way)
        left_out = 0
        for table, ways in tables.items():
            for place, key, record in records(table, ways[0]):
                where, known = f"{table}, {place}", {"#place": place, "#key": key, "#none": "none"}
                self._check(record, where)
                for way in ways:
                    prompt = _prompt(way, record, known, where)
                    if prompt is not None and way.get("drawn"):
                        prompt = _drawn(prompt)
                        left_out += prompt is None
                    if prompt is not None:
                        yield prompt
        if left_out:
            report.warn(f"{path}: {left_out} texts do not fit the {GRID * GRID} cells of a picture and are left out.")

    def _ways(self, chosen: Chosen) -> Iterator[Way]:
        """What each combination of the chosen values makes of the description."""
        for values in itertools.product(*(chosen[name] for name in self.options)):
            way: Way = {**DEFAULTS, **self.base, "words": {}, "seen": Counter()}
            for (name, option), value in zip(self.options.items(), values, strict=True):
                way["words"][name if option.values else f"{name}="] = value
                change = option.values.get(value, {})
                way |= {**change, "where": way["where"] | change.get("where", {})}
                if name in way and value and not option.values:
                    way[name] = value if name == "label" and value.casefold() in SAYS else f"{{{value}}}"
            yield way | {"file": [_filled(file, {}, way["words"], "") for file in way["file"]]}

    def _check(self, record: Any, where: str) -> None:
        """DataError for what is no record of this set: other keys, or a column by which no option's value knows it."""
        if not isinstance(record, dict):
            raise DataError(f"{where} is no record with names for its fields.")
        known = self.base.get("keys", record)
        for key in record.keys() - set(known):
            meant = "".join(f" Did you mean {word!r}?" for word in get_close_matches(key.casefold(), known, 1, 0.5))
            raise DataError(f"{where} has the unknown key {key[:80]!r}.{meant} Known are {', '.join(known)}.")
        for option in self.options.values():
            wanted = [value.get("where", {}) for value in option.values.values()]
            for column in set.intersection(*map(set, wanted)) if wanted else ():
                patterns = dict.fromkeys(columns[column] for columns in wanted)
                if not any(_matched(record, column, pattern, where) for pattern in patterns):
                    said = repr(entry(record, column))[:80]
                    raise DataError(f"{where} has {said} as {column!r}; it must be one of {', '.join(patterns)}.")


def described(path: Path) -> DataSet:
    """The data set of a file of sets/."""
    base = tomllib.loads(path.read_text(encoding="utf-8"))
    options = base.pop("options", {})
    if not any("image" in fields for fields in [base, *(value for of in options.values() for value in of.values())]):
        options["as"] = AS
    return DataSet(path.stem, base, {name: Option.of(values) for name, values in options.items()})


def _table(path: Path, way: Way) -> tuple[Path, Path]:
    """The root and the table. DataError where there is none."""
    if path.is_file():
        return path.parent, path
    if not way["file"]:
        raise DataError(f"{path} is a directory. Name its data set, as name:{path}, or the table in it.")
    roots = [path / root for root in way["root"] if (path / root).is_dir()]
    tables = [(root, root / name) for name in way["file"] for root in roots]
    for root, table in tables:
        if table.is_file():
            return root, table
    raise DataError(f"there is no file {tables[0][1]}. Name the data set's directory as it was published.")


def _prompt(way: Way, record: Any, known: dict[str, str], where: str) -> Prompt | None:
    """The prompt that a way makes of a record; None where it leaves the record out."""
    words = way["words"] | known
    for column, pattern in way["where"].items():
        match = _matched(record, column, pattern, where)
        if match is None:
            return None
        words |= match.groupdict()
    category = _filled(way["category"], record, words, where)
    way["seen"][category] += 1
    words["#nth"] = str(way["seen"][category])
    fill = partial(_filled, record=record, words=words, where=where)
    picture = _picture(way, record, words, where)
    prompt = unmarked(fill(way["prompt"]), bool(picture), where)
    if not prompt.strip() and not picture:
        raise DataError(f"{where} has an empty prompt and no image.{_columns(record, way['prompt'])}")
    return Prompt(
        name=fill(way["name"]),
        prompt=prompt,
        label=_label(way["label"], record, words.get("harmful="), where),
        group=fill(way["group"]),
        category=category,
        attack=fill(way["attack"]),
        question=fill(way["question"]),
        kind=fill(way["kind"]),
        borderline=bool(_value(way["borderline"], record)),
        **picture,
    )


def _picture(way: Way, record: Any, words: dict[str, str], where: str) -> dict[str, Any]:
    """The fields of a Prompt with a picture, none without one."""
    files = way.get("image", ())
    if isinstance(files, str):  # the column of a table, which may be empty, or missing where nobody named it
        column = files.strip("{}")
        if words.get("image=") and column not in record:
            raise DataError(f"{where} has no {column!r}, which image={column} names.{_columns(record, column)}")
        value = entry(record, column)
        if isinstance(value, dict):  # as Parquet and the hub hold pictures
            return pictured(where, value.get("bytes") or Path(str(value.get("path"))))
        files = [files] if value else []
    return pictured(where, *[way["at"] / _filled(file, record, words, where) for file in files]) if files else {}


def _columns(record: Any, wanted: str) -> str:
    """What a message adds where a record lacks a column: those that it has."""
    return "" if wanted.strip("{|}") in record else f" Its columns are {', '.join(map(str, record))[:300]}."


def _label(label: Any, record: Any, harmful: str | None, where: str) -> int:
    """A label that the description gives, or the record's, which counts as harmful if it is one of `harmful`."""
    value = _value(label, record)
    said = str(value).strip().casefold()
    if harmful and value is not None:
        return int(said in harmful.casefold().split("+"))
    if said not in SAYS:
        how = "" if harmful is None else " Say label=COLUMN, label=0 or 1 for all, or harmful=VALUE+VALUE."
        how += _columns(record, label) if value is None else ""
        raise DataError(f"{where} has the label {repr(value)[:80]}; it must be 0 (harmless) or 1 (harmful).{how}")
    return SAYS[said]


def _value(said: Any, record: Any) -> Any:
    """What a description says, or the record's column that it names in braces."""
    return entry(record, said.strip("{}")) if isinstance(said, str) and said.startswith("{") else said


def _drawn(prompt: Prompt) -> Prompt | None:
    """The same request as a picture under an innocuous text; None where it does not fit."""
    words, seed = prompt.prompt, crc32(prompt.prompt.encode())
    if not fits(words):
        return None
    image, text = partial(drawn, words, seed), CARRIERS[seed % len(CARRIERS)]
    return replace(prompt, name=f"{prompt.name}/picture", prompt=text, question=words, channel="picture", image=image)


def _matched(record: Any, column: str, pattern: str, where: str) -> re.Match[str] | None:
    said = _filled(f"{{{column}}}", record, {}, where)
    return re.fullmatch(pattern, said.strip(), re.IGNORECASE | re.DOTALL)


def _filled(template: str, record: Any, words: Mapping[str, str], where: str) -> str:
    """The template with its braces filled in. DataError where the record has no text there."""

    def text(match: re.Match[str]) -> str:
        for name in match[1].split("|"):
            value = words.get(name) or entry(record, name)
            if isinstance(value, str | int) and str(value).strip():
                return str(value)
            if value is not None and not isinstance(value, str):
                raise DataError(f"{where} has a {name!r} that is not a text.")
        if name:
            raise DataError(f"{where} has no text {name!r}.{_columns(record, name)}")
        return ""

    return re.sub(r"\{([^{}]+)\}", text, template)
