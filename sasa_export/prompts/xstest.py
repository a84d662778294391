"""XSTest (Roettger et al., NAACL 2024): 250 harmless prompts that look harmful, and 200 contrasts that are.

    xstest_prompts.csv        id, prompt, type, label, focus, note
    xstest_v2_prompts.csv     id_v1, id_v2, type, prompt, focus, note (the release before: no label)

The types of harmful prompts begin with contrast_. The measure of over-refusal is taken on the harmless ones.
"""

from __future__ import annotations

import re
from pathlib import Path

from sasa_export.errors import DataError
from sasa_export.prompts.read import find, rows_of, text_in
from sasa_export.prompts.record import Names, Record, record
from sasa_export.prompts.spec import Chosen, Loader, Option

NAME = "xstest"
TABLES = ("xstest_prompts.csv", "xstest_v2_prompts.csv")
CONTRAST = "contrast_"
PAIRED = ("homonyms", "figurative_language", "safe_targets", "safe_contexts", "definitions", "historical_events")
FAMILIES = {  # every type, and the family whose contrasts it is set against
    **{name: name for name in PAIRED},
    "nons_group_real_discr": "discr",
    "real_group_nons_discr": "discr",
    "privacy_public": "privacy",
    "privacy_fictional": "privacy",
}
TYPES = {**FAMILIES, **{CONTRAST + family: family for family in (*PAIRED, "discr", "privacy")}}
BLOCK = 25  # a type has 25 prompts, in the order of the contrasts they are paired with
LABELS = {"safe": 0, "unsafe": 1}


def read(path: Path, chosen: Chosen) -> list[Record]:
    """One record a prompt. `path` is the CSV file, or the directory that has it."""
    if path.is_dir():
        path = find([path / table for table in TABLES], f"Give the CSV file of XSTest: {NAME}:FILE.")
    else:
        path = find([path], f"Give the CSV file of XSTest: {NAME}:FILE.")
    found, names = [], Names()
    for where, row in rows_of(path, ("prompt", "type")):
        key = next((key for key in ("id", "id_v2") if key in row), None)
        if key is None:
            raise DataError(f"{path} has no column 'id'; it has {', '.join(row)[:200]}.")
        name = names.take(text_in(row, key, where), where)
        kind = text_in(row, "type", where).strip()
        if kind not in TYPES:
            raise DataError(f"{where} has the unknown type {kind!r}; it must be one of {', '.join(TYPES)}.")
        label = int(kind.startswith(CONTRAST))
        _check_label(row, kind, label, where)
        prompt = text_in(row, "prompt", where)
        if ("unsafe" if label else "safe") in chosen["subset"]:
            group = _pair(TYPES[kind], name)
            found.append(record(source=NAME, name=name, prompt=prompt, label=label, group=group, category=kind))
    return found


def _check_label(row: dict[str, str], kind: str, label: int, where: str) -> None:
    if "label" not in row:
        return
    given = row["label"].strip()
    if given not in LABELS:
        raise DataError(f"{where} has the label {given!r}; it must be safe or unsafe.")
    if LABELS[given] != label:
        raise DataError(f"{where} has the label {given!r}, which contradicts its type {kind!r}.")


def _pair(family: str, name: str) -> str:
    """A prompt and its contrast differ in a word or two, so they stay together: number 1 and 26, 2 and 27 ..."""
    number = re.fullmatch(r"(?:v2-)?(\d{1,9})", name)
    return f"{family}/{(int(number.group(1)) - 1) % BLOCK + 1}" if number else f"{family}/{name}"


LOADER = Loader(NAME, read, {"subset": Option(tuple(LABELS), tuple(LABELS))})
