"""Reading the tables and pictures that data sets come in, each fault named with its place. Text is in UTF-8."""

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

LONGEST_FIELD = 16 << 20  # characters of a CSV field; the csv module stops at 131072 unless it is told
TABLES = (".csv", ".json", ".parquet", ".yaml", ".yml")  # beside JSONL
# Formats that Pillow reads by itself; for some others it starts a program.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


@dataclass(frozen=True)
class Row:
    """A record of a table. `place` is where it stands in it, for messages, and `key` its key or number."""

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
        """The first text under the names, else the default. DataError without one, and for what is no text."""
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
        """The text under the name as `folded`. DataError where it is none of the known."""
        word = folded(self.text(name))
        if word not in known:
            said = repr(entry(self.fields, name))[:80]
            raise DataError(f"{self.where} has {said} as {name!r}; it must be one of {', '.join(known)}.")
        return word

    def columns(self, wanted: str) -> str:
        """What a message adds where the column is not there: those that are."""
        return "" if wanted in self.fields else f" Its columns are {', '.join(map(str, self.fields))[:300]}."


def folded(word: str) -> str:
    """A word as options and kinds are compared: case does not count, and - is as good as _."""
    return word.strip().casefold().replace("_", "-")


def rows(path: Path, inside: str | None = None, *, lines: bool = False) -> Iterator[Row]:
    """The records of a table, in the format that its name says, or with `lines` an object a line, whatever its name.

    Args: inside: the key of the list of records, where the table is one object.
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
    """The rows of a data set of the hub, through `datasets`, which keeps what it downloads."""
    import datasets

    said = (
        f"the data set {name} of the hub cannot be loaded ({{reason}}). Check its id, config= and split=, the "
        "connection, and whether it asks for `hf auth login`."
    )
    with reworded(DataError, said):
        found = datasets.load_dataset(str(name), config or None, split=split)
        for column, feature in found.features.items():
            if isinstance(feature, datasets.Image):  # as bytes, so that not all pictures are in memory as pixels
                found = found.cast_column(column, datasets.Image(decode=False))
    yield from _numbered(name, found)


def _numbered(table: Path, values: Iterable[Any]) -> Iterator[Row]:
    return (Row(table, f"record {number}", str(number), value) for number, value in enumerate(values, 1))


def _text_of(path: Path) -> str:
    """The whole file; a byte order mark is dropped."""
    with reworded(DataError, f"{path} cannot be read as text in UTF-8 ({{reason}})."):
        return path.read_text(encoding="utf-8-sig")


def _parsed(text: str, where: str) -> Any:
    """The value of a JSON text."""
    with reworded(DataError, f"{where} is not valid JSON ({{reason}})."):
        return json.loads(text)


def entry(record: Any, name: str) -> Any:
    """What a record has under a name; `a.b` is the entry b of a, which may be a list of objects. None for nothing."""
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
    """The picture in RGB. DataError, which begins with `where`, if it is none, or in another than `FORMATS`."""
    file, name = (io.BytesIO(held), "in it") if isinstance(held, bytes) else (held, held)
    said = f"{where} names the image {name}, which cannot be read ({{reason}}). Give it as {', '.join(FORMATS)}."
    with reworded(DataError, said), Image.open(file, formats=FORMATS) as picture:
        return _in_rgb(picture)


def _in_rgb(picture: Image.Image) -> Image.Image:
    """Pillow cuts off what is above 255, which leaves pictures of 16 bits white: they are scaled down here."""
    if picture.mode == "F" or (picture.mode == "I" and picture.format == "TIFF"):
        raise ValueError(f"its values have no fixed range, being of mode {picture.mode}")
    if picture.mode.startswith("I"):
        values = np.clip(np.asarray(picture, dtype=np.int64), 0, 65535)  # (height, width)
        picture = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    return picture.convert("RGB")
