"""Reading the files that data sets come in: CSV and JSON in UTF-8, each fault named with its place."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sasa_export.errors import DataError

LONGEST_FIELD = 16 << 20  # characters of a CSV field; the csv module stops at 131072 unless it is told


def find(candidates: Sequence[Path], what: str) -> Path:
    """The first of the files that is there. DataError names the first candidate."""
    for path in candidates:
        if os.path.isfile(path):  # false, not an error, for a name that no file can have
            return path
    raise DataError(f"there is no file {candidates[0]}. {what}")


def text_of(path: Path) -> str:
    """The whole file; a byte order mark is dropped."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not in UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from None


def rows_of(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Each row of a CSV file with its place; `columns` must be there, others may be."""
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.DictReader(io.StringIO(text_of(path), newline=""), strict=True)
    where = f"{path}, line 1"
    try:
        header = reader.fieldnames
        if not header:
            raise DataError(f"{path} is empty. Its first line should name the columns {', '.join(columns)}.")
        missing = [column for column in columns if column not in header]
        if missing:
            raise DataError(f"{path} has no column {missing[0]!r}; it has {', '.join(header)[:200]}.")
        if len(set(header)) < len(header):
            raise DataError(f"{path} has a column twice: {', '.join(header)[:200]}.")
        while True:
            where = f"{path}, line {reader.line_num + 1}"
            try:
                row = next(reader)
            except StopIteration:
                return
            if None in row:
                raise DataError(f"{where} has more fields than the {len(header)} columns.")
            if None in row.values():
                raise DataError(f"{where} has fewer fields than the {len(header)} columns.")
            yield where, row
    except csv.Error as error:
        raise DataError(f"{where} is not valid CSV ({error}).") from None


def json_of(path: Path) -> Any:
    """The parsed file. A key that stands twice in one object is an error: one of the two would be lost."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise DataError(f"{path} has {key!r} twice in one object.")
            found[key] = value
        return found

    try:
        return json.loads(text_of(path), object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not valid JSON ({error.msg} at line {error.lineno}).") from None
    except (ValueError, RecursionError):  # a number too long or a nesting too deep for Python
        raise DataError(f"{path} is not JSON of this data set's format.") from None


def text_in(fields: Mapping[str, Any], key: str, where: str) -> str:
    """A text that must be there and say something."""
    if key not in fields:
        raise DataError(f"{where} has no {key!r}.")
    value = fields[key]
    if not isinstance(value, str):
        raise DataError(f"{where} has a {key!r} that is no text ({type(value).__name__}).")
    if not value.strip():
        raise DataError(f"{where} has an empty {key!r}.")
    if any(0xD800 <= ord(letter) <= 0xDFFF for letter in value):
        raise DataError(f"{where} has half a character (a lone surrogate) in its {key!r}.")
    return value
