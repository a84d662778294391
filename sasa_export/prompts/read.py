"""Read the tables and pictures of data sets. Errors name the place of each fault. Text is UTF-8."""

import csv
import io
import json
from collections import ChainMap
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from sasa_export.errors import DataError, reworded

LONGEST_FIELD = 16 << 20  # characters of a CSV field; the csv module's default limit is 131072
TABLES = (".csv", ".json", ".parquet", ".yaml", ".yml")  # besides JSONL
# Formats that Pillow decodes by itself. It starts external programs for some others.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


@dataclass(frozen=True)
class Row:
    """A record of a table. `place` describes its position, for messages; `key` is its key or number."""

    table: Path
    place: str
    key: str
    fields: dict[str, Any]

    def __post_init__(self) -> None:
        if not isinstance(self.fields, dict):
            raise DataError(f"{self.where} is no record with names for its fields.")

    @property
    def where(self) -> str:
        return f"{self.table}, {self.place}"

    def text(self, *names: str, default: str | None = None) -> str:
        """Return the first text under `names`, or the default. Raises DataError without either, or for a non-text."""
        for name in names:
            value = entry(self.fields, name)
            if isinstance(value, str | int) and str(value).strip():
                return str(value)
            if value is not None and not isinstance(value, str):
                raise DataError(f"{self.where} has a {name!r} that is not a text.")
        if default is None:
            raise DataError(f"{self.where} has no text {names[-1]!r}.{self.columns(names[-1])}")
        return default

    def one_of(self, name: str, known: Collection[str]) -> str:
        """Return the text under `name`, `folded`. Raises DataError if it is not in `known`."""
        word = folded(self.text(name))
        if word not in known:
            said = repr(entry(self.fields, name))[:80]
            raise DataError(f"{self.where} has {said} as {name!r}; it must be one of {', '.join(known)}.")
        return word

    def columns(self, wanted: str) -> str:
        """Return a sentence for error messages that lists the columns, or "" if `wanted` is one of them."""
        return "" if wanted in self.fields else f" Its columns are {', '.join(map(str, self.fields))[:300]}."


def folded(word: str) -> str:
    """Return a word normalised for comparing options and kinds: casefolded, with - for _."""
    return word.strip().casefold().replace("_", "-")


def rows(path: Path, inside: str | None = None, *, lines: bool = False) -> Iterator[Row]:
    """Yield the records of a table. The suffix gives the format; `lines` forces JSONL.

    Args: inside: the key of the list of records, if the table is one object.
    """
    kind = path.suffix.lower()
    if lines or kind in (".jsonl", ".ndjson"):
        for number, line in enumerate(_text_of(path).split("\n"), 1):  # JSON strings may hold other line separators
            if line.strip():
                yield Row(path, f"line {number}", str(number), _parsed(line, f"{path}, line {number}"))
    elif kind in (".csv", ".parquet"):
        yield from _numbered(path, _csv(path) if kind == ".csv" else _parquet(path))
    else:
        value = _parsed(_text_of(path), str(path)) if kind == ".json" else _yaml(path)
        if inside is not None and isinstance(value, dict):
            value = value.get(inside)
        if isinstance(value, dict):
            yield from (Row(path, f"record {key!r}", str(key), record) for key, record in value.items())
        elif isinstance(value, list):
            for number, record in enumerate(value, 1):
                name = entry(record, "id")
                said = f" ({name!r})" if isinstance(name, str) else ""
                yield Row(path, f"record {number}{said}", str(number), record)
        else:
            raise DataError(f"{path} holds neither a list of records nor an object of them.")


def rows_of_hub(name: Path, config: str, split: str) -> Iterator[Row]:
    """Yield the rows of a hub data set. The `datasets` library downloads and caches it."""
    import datasets

    said = (
        f"the data set {name} of the hub cannot be loaded ({{reason}}). Check its id, config= and split=, the "
        "connection, and whether it asks for `hf auth login`."
    )
    with reworded(DataError, said):
        found = datasets.load_dataset(str(name), config or None, split=split)
        for column, feature in found.features.items():
            if isinstance(feature, datasets.Image):  # keep bytes: decoded pictures would fill memory
                found = found.cast_column(column, datasets.Image(decode=False))
    yield from _numbered(name, found)


def _numbered(table: Path, values: Iterable[Any]) -> Iterator[Row]:
    return (Row(table, f"record {number}", str(number), value) for number, value in enumerate(values, 1))


def _text_of(path: Path) -> str:
    """Return the file's text without a byte order mark."""
    with reworded(DataError, f"{path} cannot be read as text in UTF-8 ({{reason}})."):
        return path.read_text(encoding="utf-8-sig")


def _parsed(text: str, where: str) -> Any:
    """Return the value of a JSON text."""
    with reworded(DataError, f"{where} is not valid JSON ({{reason}})."):
        return json.loads(text)


def entry(record: Any, name: str) -> Any:
    """Return the value under a name, or None. `a.b` is entry b of a, where a is an object or a list of objects."""
    if isinstance(record, list):
        record = dict(ChainMap(*[part for part in record if isinstance(part, dict)]))
    if not isinstance(record, dict):
        return None
    outer, dot, inner = name.partition(".")
    return entry(record.get(outer), inner) if dot and name not in record else record.get(name)


def _csv(path: Path) -> Iterator[dict[str, str]]:
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
    from pyarrow.parquet import read_table

    with reworded(DataError, f"{path} is not valid Parquet ({{reason}})."):
        return read_table(path).to_pylist()


def _yaml(path: Path) -> Any:
    try:
        return yaml.load(_text_of(path), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid YAML ({' '.join(str(error).split())[:200]}).") from None


def open_picture(held: Path | bytes, where: str) -> Image.Image:
    """Return the picture in RGB. Raises DataError, beginning with `where`, if unreadable or not in `FORMATS`."""
    file, name = (io.BytesIO(held), "in it") if isinstance(held, bytes) else (held, held)
    said = f"{where} names the image {name}, which cannot be read ({{reason}}). Give it as {', '.join(FORMATS)}."
    with reworded(DataError, said), Image.open(file, formats=FORMATS) as picture:
        return _in_rgb(picture)


def _in_rgb(picture: Image.Image) -> Image.Image:
    """Return the picture in RGB. 16-bit values are scaled to 8 bits, because Pillow would clip them to white."""
    if picture.mode == "F" or (picture.mode == "I" and picture.format == "TIFF"):
        raise ValueError(f"its values have no fixed range, being of mode {picture.mode}")
    if picture.mode.startswith("I"):
        values = np.clip(np.asarray(picture, dtype=np.int64), 0, 65535)  # (height, width)
        picture = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    return picture.convert("RGB")
