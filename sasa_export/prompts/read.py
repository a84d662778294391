"""Reading the tables that data sets come in, each fault named with its place. Text is in UTF-8."""

from __future__ import annotations

import csv
import io
import json
from collections import ChainMap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sasa_export.errors import DataError

LONGEST_FIELD = 16 << 20  # characters of a CSV field; the csv module stops at 131072 unless it is told
TABLES = (".csv", ".json", ".parquet", ".yaml", ".yml")  # beside JSONL

Record = tuple[str, str, Any]  # its place, for messages; its key or number; what it holds


def _text_of(path: Path) -> str:
    """The whole file; a byte order mark is dropped."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text in UTF-8 ({error}).") from None


def records(path: Path, described: Mapping[str, Any]) -> Iterator[Record]:
    """The records of a table, in the format that its name says, or else in `lines` or on the `hub` as described."""
    kind = path.suffix.lower()
    if "hub" in described:
        yield from _numbered(_hub(str(path), described["words"]["config="], described["words"]["split="]))
    elif "lines" in described or kind in (".jsonl", ".ndjson"):
        yield from _lines(path)
    elif kind in (".csv", ".parquet"):
        yield from _numbered(_rows(path) if kind == ".csv" else _parquet(path))
    else:
        value = _parsed(_text_of(path), str(path)) if kind == ".json" else _yaml(path)
        yield from _inside(value, described.get("records"), path)


def _lines(path: Path) -> Iterator[Record]:
    for number, line in enumerate(_text_of(path).split("\n"), 1):  # JSON strings may hold other line separators
        if line.strip():
            yield f"line {number}", str(number), _parsed(line, f"{path}, line {number}")


def _parsed(text: str, where: str) -> Any:
    """The value of a JSON text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON ({error}).") from None


def _hub(name: str, config: str, split: str) -> Any:
    """The rows of a data set of the hub, through `datasets`, which keeps what it downloads."""
    from datasets import Image, load_dataset

    try:
        found = load_dataset(name, config or None, split=split)
        for column, feature in found.features.items():
            if isinstance(feature, Image):  # as bytes, so that not all pictures are in memory as pixels
                found = found.cast_column(column, Image(decode=False))
    except Exception as error:  # whatever the hub, the network and its readers raise
        raise DataError(
            f"the data set {name} of the hub cannot be loaded ({' '.join(str(error).split())[:300]}). Check its id, "
            "config= and split=, the connection, and whether it asks for `hf auth login`."
        ) from None
    return found


def entry(record: Any, name: str) -> Any:
    """What a record has under a name; `a.b` is the entry b of a, which may be a list of objects. None for nothing."""
    if isinstance(record, list):
        record = dict(ChainMap(*[part for part in record if isinstance(part, dict)]))
    if not isinstance(record, dict):
        return None
    outer, dot, inner = name.partition(".")
    return entry(record.get(outer), inner) if dot and name not in record else record.get(name)


def _numbered(values: Any) -> Iterator[Record]:
    for number, value in enumerate(values, 1):
        yield f"record {number}", str(number), value


def _inside(value: Any, inside: str | None, path: Path) -> Iterator[Record]:
    """The records of a list, or of an object by key."""
    if inside is not None and isinstance(value, dict):
        value = value.get(inside)
    if isinstance(value, list):
        for place, key, record in _numbered(value):
            name = entry(record, "id")
            yield f"{place} ({name!r})" if isinstance(name, str) else place, key, record
    elif isinstance(value, dict):
        for key, record in value.items():
            yield f"record {key!r}", str(key), record
    else:
        raise DataError(f"{path} holds neither a list of records nor an object of them.")


def _rows(path: Path) -> Iterator[dict[str, str]]:
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.DictReader(io.StringIO(_text_of(path), newline=""), strict=True)
    try:
        for number, row in enumerate(reader, 1):
            if None in row or None in row.values():
                raise DataError(f"{path}, record {number} has more or fewer fields than the first line names.")
            yield row
    except csv.Error as error:
        raise DataError(f"{path} is not valid CSV ({error} at line {reader.line_num}).") from None


def _parquet(path: Path) -> list[dict[str, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    try:
        return read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} is not valid Parquet ({' '.join(str(error).split())[:200]}).") from None


def _yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.load(_text_of(path), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid YAML ({' '.join(str(error).split())[:200]}).") from None
