"""VLGuard (Zong et al., ICML 2024): harmful pictures, and harmless ones with a harmful and a harmless instruction.

    train.json, test.json    [{"id", "image", "safe", "harmful_category"?, "harmful_subcategory"?, "instr-resp": [...]}]
    train/, test/            the pictures, unzipped

Subsets: unsafes (harmful picture), safe_unsafes (harmful instruction for a harmless picture), safe_safes (harmless).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sasa_export.errors import DataError
from sasa_export.prompts.picture import Pictures
from sasa_export.prompts.read import find, json_of, text_in
from sasa_export.prompts.record import Names, Record, record
from sasa_export.prompts.spec import Chosen, Loader, Option

NAME = "vlguard"
INSTRUCTIONS = {"unsafes": "instruction", "safe_unsafes": "unsafe_instruction", "safe_safes": "safe_instruction"}


def read(directory: Path, chosen: Chosen) -> list[Record]:
    """One record an instruction of the chosen splits and subsets. `directory` has the JSON files, or its data/ has."""
    found, names = [], Names()
    for part in chosen["split"]:
        path = find(
            [directory / f"{part}.json", directory / "data" / f"{part}.json"],
            f"Give the directory of VLGuard that has {part}.json beside {part}/: {NAME}:DIR.",
        )
        pictures = Pictures(path.parent / part, path.parent / "VLGuard" / part, path.parent)
        entries = json_of(path)
        if not isinstance(entries, list):
            raise DataError(f"{path} is no JSON list of pictures.")
        for position, entry in enumerate(entries, 1):
            where = f"{path}, record {position}"
            if not isinstance(entry, dict):
                raise DataError(f"{where} is no JSON object.")
            name = text_in(entry, "id", where)
            where = f"{where} ({name!r})"
            names.take(f"{part}/{name}", where)
            found += [made for made in _records(entry, part, name, pictures, where) if made.attack in chosen["subset"]]
    return found


def _records(entry: dict[str, Any], part: str, name: str, pictures: Pictures, where: str) -> Iterator[Record]:
    safe = entry.get("safe")
    if not isinstance(safe, bool):
        raise DataError(f'{where} has {safe!r} as "safe"; it must be true or false.')
    turns = entry.get("instr-resp")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(f'{where} has no list of instructions in "instr-resp".')
    category = "none"
    if not safe:
        category = "/".join(text_in(entry, key, where) for key in ("harmful_category", "harmful_subcategory"))
    picture = pictures.find(text_in(entry, "image", where), where)
    for subset in ("safe_safes", "safe_unsafes") if safe else ("unsafes",):
        key = INSTRUCTIONS[subset]
        turn = next((turn for turn in turns if key in turn), None)
        if turn is None:
            raise DataError(f"{where} has no {key!r}, which a {'harmless' if safe else 'harmful'} picture must have.")
        yield record(
            source=NAME,
            name=f"{part}/{name}/{subset}",
            prompt=text_in(turn, key, where),
            label=0 if subset == "safe_safes" else 1,
            group=f"{part}/{name}",
            category=category,
            attack=subset,
            picture=picture,
            where=where,
        )


LOADER = Loader(
    NAME,
    read,
    {
        "split": Option(("train", "test"), ("test",)),
        "subset": Option(tuple(INSTRUCTIONS), tuple(INSTRUCTIONS)),
    },
)
