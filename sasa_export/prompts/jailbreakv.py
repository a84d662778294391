"""JailBreakV-28K (Luo et al., COLM 2024): jailbreaks of language models carried over, and attacks by picture.

    JailBreakV_28K/JailBreakV_28K.csv, mini_JailBreakV_28K.csv    id, jailbreak_query, redteam_query, format, policy,
                                                                  image_path, from, selected_mini, transfer_from_llm
    JailBreakV_28K/llm_transfer_attack/, figstep/, query_related/ what image_path is relative to: JailBreakV_28K/

All records are harmful. Few pictures go with many questions in llm_transfer_attack (blank, noise, nature).
"""

from __future__ import annotations

from pathlib import Path

from sasa_export.errors import DataError
from sasa_export.prompts.picture import Pictures
from sasa_export.prompts.read import find, rows_of, text_in
from sasa_export.prompts.record import Names, Record, record
from sasa_export.prompts.spec import Chosen, Loader, Option, folded

NAME = "jailbreakv"
COLUMNS = (
    "id",
    "jailbreak_query",
    "redteam_query",
    "format",
    "policy",
    "image_path",
    "from",
    "selected_mini",
    "transfer_from_llm",
)
FLAGS = ("selected_mini", "transfer_from_llm")
QUERY_RELEVANT = ("sd", "sd-typo", "typo", "query-relevant")  # the files say which of the first three
FORMATS = ("template", "persuade", "logic", "figstep", *QUERY_RELEVANT)
FOLDERS = ("JailBreakV_28K", "JailBreakV_28k", ".")  # the archive and the repository differ in the case
FULL, MINI = "JailBreakV_28K.csv", "mini_JailBreakV_28K.csv"


def read(directory: Path, chosen: Chosen) -> list[Record]:
    """One record a row of the chosen formats. `directory` is JailBreakV_28K/, or holds it."""
    mini = chosen["mini"] == ("yes",)
    tables = [directory / folder / table for table in ((MINI, FULL) if mini else (FULL,)) for folder in FOLDERS]
    path = find(tables, f"Give the directory that has JailBreakV_28K/: {NAME}:DIR.")
    pictures, names = Pictures(path.parent), Names()
    found = []
    for where, row in rows_of(path, COLUMNS):
        name = names.take(text_in(row, "id", where), where)
        where = f"{where} (id {name})"
        kind = folded(text_in(row, "format", where))
        if kind not in FORMATS:
            raise DataError(
                f"{where} has the unknown format {row['format']!r}; it must be one of {', '.join(FORMATS)}."
            )
        for column in FLAGS:
            if folded(row[column]) not in ("true", "false"):
                raise DataError(f"{where} has {row[column]!r} as {column}; it must be True or False.")
        selected = folded(row["selected_mini"]) == "true"
        if kind not in chosen["format"] or (mini and path.name == FULL and not selected):
            continue
        found.append(
            record(
                source=NAME,
                name=name,
                prompt=text_in(row, "jailbreak_query", where),
                label=1,
                group=name,
                category=text_in(row, "policy", where),
                attack=kind,
                question=text_in(row, "redteam_query", where),
                picture=pictures.find(text_in(row, "image_path", where), where),
                where=where,
            )
        )
    return found


LOADER = Loader(
    NAME,
    read,
    {
        "format": Option(FORMATS, FORMATS, {"query-relevant": QUERY_RELEVANT}),
        "mini": Option(("yes", "no"), ("no",), several=False),
    },
)
