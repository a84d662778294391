"""XSTest (Roettger et al., NAACL 2024): 250 harmless prompts that look harmful, and 200 contrasts that are.

    xstest_prompts.csv        id, prompt, type, label, focus, note
    xstest_v2_prompts.csv     id_v1, id_v2, type, prompt, focus, note (the release before: no label)

The types of harmful prompts begin with contrast_. The measure of over-refusal is taken on the harmless ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from sasa_export.prompts.prompt import Prompt
from sasa_export.prompts.read import find, rows_of, text_in
from sasa_export.prompts.spec import Chosen, Option

TABLES = ("xstest_prompts.csv", "xstest_v2_prompts.csv")
CONTRAST = "contrast_"
FAMILIES = {  # types whose contrasts have another name
    "nons_group_real_discr": "discr",
    "real_group_nons_discr": "discr",
    "privacy_public": "privacy",
    "privacy_fictional": "privacy",
}
BLOCK = 25  # a type has 25 prompts, in the order of the contrasts they are paired with
SUBSETS = ("safe", "unsafe")  # by label
OPTIONS = {"subset": Option(SUBSETS, SUBSETS)}


def read(path: Path, chosen: Chosen) -> Iterator[Prompt]:
    """One prompt a row. `path` is the CSV file, or the directory that has it."""
    table = find(*[path / table for table in TABLES]) if path.is_dir() else path
    for where, row in rows_of(table):
        name, kind = text_in(row, "id" if "id" in row else "id_v2", where), text_in(row, "type", where).strip()
        label = int(kind.startswith(CONTRAST))
        if SUBSETS[label] in chosen["subset"]:
            yield Prompt(name, text_in(row, "prompt", where), label, _pair(kind, name), category=kind)


def _pair(kind: str, name: str) -> str:
    """A prompt and its contrast differ in a word or two, so they stay together: number 1 and 26, 2 and 27 ..."""
    family, number = kind.removeprefix(CONTRAST), re.search(r"\d+$", name)
    return f"{FAMILIES.get(family, family)}/{(int(number[0]) - 1) % BLOCK + 1 if number else name}"
