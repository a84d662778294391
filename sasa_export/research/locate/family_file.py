"""Write the layers found into a family's file, as a [[layers]] entry, and leave everything else in it as it is."""

from __future__ import annotations

import json
import os
import re
import tomllib
from dataclasses import asdict
from pathlib import Path

from sasa_export.errors import LocateError, SasaExportError
from sasa_export.models import Source
from sasa_export.models.family import Family, KnownLayers, directory, read
from sasa_export.research.locate.result import Located


def check_family(path: Path, source: Source) -> None:
    """Raise before the work where the file could not be written afterwards: LocateError, SasaExportError."""
    if path.suffix != ".toml":
        raise LocateError(f"--write-family is {path}; a family's file ends in .toml.")
    if not path.parent.is_dir():
        raise LocateError(f"--write-family is {path}, and there is no folder {path.parent}. Make it first.")
    if path.exists():
        family = _read(path)
        if source.config.get("model_type") not in family.model_types:
            raise LocateError(
                f"--write-family is {path}, whose model types are {', '.join(family.model_types)}, and this model's "
                f"is {source.config.get('model_type')}. Give the file of the model's own family."
            )


def write_family(path: Path, source: Source, located: Located) -> None:
    """Put the proposal into `path`: over the entry of the same shape, or behind the last one.

    A file that is not there begins as a copy of the model's own family file. What is written is read again before it
    takes the old file's place: LocateError where it would not say what it should.
    """
    subject, proposal = located.subject, located.proposal
    pair = (proposal.safety, proposal.semantic)
    entry = KnownLayers(
        subject.model,
        subject.blocks,
        subject.hidden,
        *pair,
        f"measured with sasa-export locate: AUC {located.sweep.pairs[pair]} on {subject.harmful + subject.harmless} "
        f"prompts ({subject.source}), {len(proposal.tied) - 1} other pairs within noise",
    )
    before = path if path.exists() else directory() / f"{source.family.name}.toml"
    expected = _read(before)
    text = with_entry(before.read_text(encoding="utf-8"), entry)
    beside = path.with_name(f".{path.name}.partial-{os.getpid()}.toml")
    try:
        beside.write_text(text, encoding="utf-8")
        found = _read(beside)
        others = [known for known in expected.layers if (known.blocks, known.hidden) != (entry.blocks, entry.hidden)]
        kept = [known for known in found.layers if known != entry]
        unchanged = (found.model_types, found.aliases, found.modules, found.peculiar, found.files) == (
            expected.model_types,
            expected.aliases,
            expected.modules,
            expected.peculiar,
            expected.files,
        )
        if found.known_layers(entry.blocks, entry.hidden) != entry or kept != others or not unchanged:
            raise LocateError(
                f"{path} is laid out in a way that an entry cannot be put into safely. Add it by hand:\n{table(entry)}"
            )
        os.replace(beside, path)
    except OSError as error:
        raise LocateError(f"{path} could not be written ({error.strerror or error}), and is as it was.") from None
    finally:
        beside.unlink(missing_ok=True)


def with_entry(text: str, entry: KnownLayers) -> str:
    """The text of a family's file with the entry in it."""
    lines = text.splitlines()
    starts = [number for number, line in enumerate(lines) if re.match(r"\s*\[", line)]
    for start in starts:
        if not re.match(r"\s*\[\[\s*layers\s*\]\]", lines[start]):
            continue
        end = next((number for number in starts if number > start), len(lines))
        while end > start + 1 and (not lines[end - 1].strip() or lines[end - 1].lstrip().startswith("#")):
            end -= 1  # blank lines and comments in front of the next table belong to that one
        try:
            held = tomllib.loads("\n".join(lines[start:end]))["layers"][0]
        except tomllib.TOMLDecodeError:
            continue
        if (held.get("blocks"), held.get("hidden")) == (entry.blocks, entry.hidden):
            return "\n".join([*lines[:start], *table(entry).splitlines(), *lines[end:]]) + "\n"
    return "\n".join(lines).rstrip() + "\n\n" + table(entry)


def table(entry: KnownLayers) -> str:
    """The entry as TOML; a JSON string is a TOML string too."""
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in asdict(entry).items()]
    return "\n".join(["[[layers]]", *lines]) + "\n"


def _read(path: Path) -> Family:
    try:
        return read(path)
    except (OSError, UnicodeDecodeError) as error:
        raise SasaExportError(f"{path} cannot be read ({error}).") from None
