"""Write the layers found into a family's file, as a [[layers]] entry, and leave everything else in it as it is."""

from __future__ import annotations

import json
import os
import re
import tomllib
from dataclasses import asdict, replace
from pathlib import Path

from sasa_export.errors import LocateError
from sasa_export.models import Source
from sasa_export.models.family import Family, KnownLayers, directory, read


def check_family(path: Path, source: Source) -> None:
    """Raise before the work where the file could not be written afterwards: LocateError, SasaExportError."""
    if path.suffix != ".toml":
        raise LocateError(f"--write-family is {path}; a family's file ends in .toml.")
    if not path.parent.is_dir():
        raise LocateError(f"--write-family is {path}, and {path.parent} is not a directory. Make it first.")
    family, model_type = _before(path, source)[1], source.config.get("model_type")
    if model_type not in family.model_types:
        raise LocateError(
            f"--write-family is {path}, whose model types are {', '.join(family.model_types)}, and this model's "
            f"is {model_type}. Give the file of the model's own family."
        )


def write_family(path: Path, source: Source, entry: KnownLayers) -> None:
    """Put the entry into `path`: over the one of the same shape, or behind the last one.

    A file that is not there begins as a copy of the model's own family file. What is written is read again before it
    takes the old file's place: LocateError where it would not say what it should.
    """
    text, family = _before(path, source)
    layers = [entry if _shape(known) == _shape(entry) else known for known in family.layers]
    wanted = replace(family, layers=tuple(layers if entry in layers else [*layers, entry]))
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}.toml")
    try:
        partial.write_text(with_entry(text, entry), encoding="utf-8")
        if replace(read(partial), name=family.name) != wanted:
            raise LocateError(
                f"{path} is laid out in a way that an entry cannot be put into safely. Add it by hand: {asdict(entry)}"
            )
        os.replace(partial, path)
    except OSError as error:
        raise LocateError(f"{path} could not be written ({error.strerror or error}), and is as it was.") from None
    finally:
        partial.unlink(missing_ok=True)


def with_entry(text: str, entry: KnownLayers) -> str:
    """The text of a family's file with the entry in it."""
    # A JSON string is a TOML string too.
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in asdict(entry).items()]
    table = "\n".join(["[[layers]]", *lines]) + "\n"
    parts = re.split(r"^(?=[ \t]*\[)", text, flags=re.MULTILINE)  # one a table
    for number, part in enumerate(parts):
        if re.match(r"\s*\[\[\s*layers\s*\]\]", part):
            known = tomllib.loads(part)["layers"][0]
            if (known.get("blocks"), known.get("hidden")) == _shape(entry):
                # Blank lines and comments in front of the next table belong to that one.
                rest = re.search(r"(?:^[ \t]*(?:#.*)?\n)*\Z", part, flags=re.MULTILINE)
                return "".join([*parts[:number], table, rest[0] if rest else "", *parts[number + 1 :]])
    return text.rstrip() + "\n\n" + table


def _before(path: Path, source: Source) -> tuple[str, Family]:
    """The file to write into, or the model's own family file: its text, and what it says."""
    path = path if path.exists() else directory() / f"{source.family.name}.toml"
    try:
        return path.read_text(encoding="utf-8"), read(path)
    except (OSError, UnicodeDecodeError) as error:
        raise LocateError(f"{path} cannot be read ({error}).") from None


def _shape(layers: KnownLayers) -> tuple[int, int]:
    return layers.blocks, layers.hidden
