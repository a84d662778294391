"""All loaders by name, and the one way to load a data set."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from sasa_export.errors import DataError
from sasa_export.prompts import figstep, jailbreakv, jsonl, mm_safetybench, vlguard, xstest
from sasa_export.prompts.leak import grouped
from sasa_export.prompts.prompt import read_jsonl
from sasa_export.prompts.record import Record
from sasa_export.prompts.spec import Loader, Spec, parse

LOADERS = {
    module.LOADER.name: module.LOADER for module in (mm_safetybench, figstep, vlguard, jailbreakv, xstest, jsonl)
}
NAMES = tuple(LOADERS)


def load(spec: str, flag: str = "--data") -> list[Record]:
    """The records of one data set, in its own order; names are unique among them.

    Args:
        spec: `name:PATH`, options behind commas, or the bare path of a JSONL file (see `sasa_export.prompts.spec`).
        flag: where the user gave the spec, for the message about a missing JSONL file.

    Raises DataError (of a JSONL file CalibrationError), which names the file and the record that is wrong.
    """
    parsed, loader = named(spec)
    chosen = parsed.chosen(loader)
    if loader is jsonl.LOADER:
        records = read_jsonl(parsed.path, what=f"{flag.strip('-')} file", flag=flag)
    elif not os.path.exists(parsed.path):
        raise DataError(f"there is no {parsed.path}. Check {flag} {spec}.")
    else:
        records = loader.read(parsed.path, chosen)
    if not records:
        wanted = ", ".join(f"{name}={value}" for name, value in parsed.options.items())
        raise DataError(f"{parsed.path} has no records{f' with {wanted}' if wanted else ''}. Check {flag} {spec}.")
    return records


def load_all(specs: Sequence[str], flag: str = "--data") -> list[Record]:
    """The records of several data sets, one after the other, grouped over all of them (`grouped`).

    Where there are several, a record's name begins with its data set's, so that names stay unique.
    """
    if not specs:
        raise DataError(f"no data set is given: name one with {flag} name:PATH ({', '.join(NAMES)}).")
    found: list[Record] = []
    labels: set[str] = set()
    for position, spec in enumerate(specs):
        if spec in specs[:position]:
            raise DataError(f"{flag} {spec} is given twice, so that its records would count double.")
        records = load(spec, flag)
        if len(specs) > 1:
            label = named(spec)[1].name
            label = f"{label}#{position + 1}" if label in labels else label
            labels.add(label)
            # The groups of two data sets have nothing to do with each other, whatever they are called.
            records = [replace(one, name=f"{label}/{one.name}", group=f"{label}/{one.group}") for one in records]
        found += records
    return grouped(found)


def named(spec: str) -> tuple[Spec, Loader]:
    """A spec taken apart, and its loader."""
    parsed = parse(spec, NAMES)
    return parsed, LOADERS[parsed.name or jsonl.NAME]
