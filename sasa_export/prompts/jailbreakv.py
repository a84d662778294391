"""JailBreakV-28K (Luo et al., COLM 2024): jailbreaks of language models carried over, and attacks by picture.

    JailBreakV_28K/JailBreakV_28K.csv, mini_JailBreakV_28K.csv    id, jailbreak_query, redteam_query, format, policy,
                                                                  image_path, from, selected_mini, transfer_from_llm
    JailBreakV_28K/llm_transfer_attack/, figstep/, query_related/ what image_path is relative to: JailBreakV_28K/

All prompts are harmful. Few pictures go with many questions in llm_transfer_attack (blank, noise, nature).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sasa_export.errors import DataError
from sasa_export.prompts.picture import pictured
from sasa_export.prompts.prompt import Prompt
from sasa_export.prompts.read import find, rows_of, text_in
from sasa_export.prompts.spec import Chosen, Option, folded

QUERY_RELEVANT = ("sd", "sd-typo", "typo", "query-relevant")  # the files say which of the first three
FORMATS = ("template", "persuade", "logic", "figstep", *QUERY_RELEVANT)
FOLDERS = ("JailBreakV_28K", "JailBreakV_28k", ".")  # the archive and the repository differ in the case
FULL, MINI = "JailBreakV_28K.csv", "mini_JailBreakV_28K.csv"
OPTIONS = {
    "format": Option(FORMATS, FORMATS, {"query-relevant": QUERY_RELEVANT}),
    "mini": Option(("yes", "no"), ("no",)),
}


def read(directory: Path, chosen: Chosen) -> Iterator[Prompt]:
    """One prompt a row of the chosen formats. `directory` is JailBreakV_28K/, or holds it."""
    mini = "no" not in chosen["mini"]
    path = find(*[directory / folder / table for table in ([MINI] * mini + [FULL]) for folder in FOLDERS])
    for where, row in rows_of(path):
        name, kind = text_in(row, "id", where), folded(text_in(row, "format", where))
        if kind not in FORMATS:
            raise DataError(f"{where} has the unknown format {kind!r}; it must be one of {', '.join(FORMATS)}.")
        left_out = mini and path.name == FULL and folded(text_in(row, "selected_mini", where)) != "true"
        if kind in chosen["format"] and not left_out:
            yield Prompt(
                name=name,
                prompt=text_in(row, "jailbreak_query", where),
                label=1,
                group=name,
                category=text_in(row, "policy", where),
                attack=kind,
                question=text_in(row, "redteam_query", where),
                **pictured(where, path.parent / text_in(row, "image_path", where)),
            )
