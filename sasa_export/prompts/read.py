"""Reading the files that data sets come in: CSV and JSON in UTF-8, each fault named with its place."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sasa_export.errors import DataError

LONGEST_FIELD = 16 << 20  # characters of a CSV field; the csv module stops at 131072 unless it is told


def find(*candidates: Path) -> Path:
    """The first of the files that exists. DataError, which names the first, if none does."""
    for path in candidates:
        if os.path.isfile(path):
            return path
    raise DataError(f"there is no file {candidates[0]}. Name the data set's directory as it was published.")


def text_of(path: Path) -> str:
    """The whole file; a byte order mark is dropped."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text in UTF-8 ({error}).") from None


def rows_of(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Each row of a CSV file after its place, for messages."""
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.DictReader(io.StringIO(text_of(path), newline=""), strict=True)
    try:
        for number, row in enumerate(reader, 1):
            if None in row or None in row.values():
                raise DataError(f"{path}, record {number} has more or fewer fields than the first line names.")
            yield f"{path}, record {number}", row
    except csv.Error as error:
        raise DataError(f"{path} is not valid CSV ({error} at line {reader.line_num}).") from None


def json_of(path: Path, kind: type) -> Any:
    """The parsed file, which must be a `kind`: list or dict."""
    value = parsed(text_of(path), str(path))
    if not isinstance(value, kind):
        raise DataError(f"{path} is not a JSON {'list' if kind is list else 'object'}, as this data set's files are.")
    return value


def parsed(text: str, where: str) -> Any:
    """The value of a JSON text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON ({error}).") from None


def text_in(fields: Any, key: str, where: str) -> str:
    """A text that must be in the record, and say something."""
    value = fields.get(key) if isinstance(fields, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where} has no text {key!r}.")
    return value
