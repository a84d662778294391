"""VLGuard (Zong et al., ICML 2024): harmful pictures, and harmless ones with a harmful and a harmless instruction.

    train.json, test.json    [{"id", "image", "safe", "harmful_category"?, "harmful_subcategory"?, "instr-resp": [...]}]
    train/, test/            the pictures, unzipped

Subsets: unsafes (harmful picture), safe_unsafes (harmful instruction for a harmless picture), safe_safes (harmless).
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sasa_export.errors import DataError
from sasa_export.prompts.picture import pictured
from sasa_export.prompts.prompt import Prompt
from sasa_export.prompts.read import find, json_of, text_in
from sasa_export.prompts.spec import Chosen, Option

INSTRUCTIONS = {"unsafes": "instruction", "safe_unsafes": "unsafe_instruction", "safe_safes": "safe_instruction"}
OPTIONS = {
    "split": Option(("train", "test"), ("test",)),
    "subset": Option(tuple(INSTRUCTIONS), tuple(INSTRUCTIONS)),
}


def read(directory: Path, chosen: Chosen) -> Iterator[Prompt]:
    """One prompt an instruction of the chosen splits and subsets. `directory` has the JSON files, or its data/ has."""
    for part in chosen["split"]:
        path = find(directory / f"{part}.json", directory / "data" / f"{part}.json")
        for position, entry in enumerate(json_of(path, list), 1):
            where = f"{path}, record {position}"
            for prompt in _prompts(entry, part, path.parent, f"{where} ({text_in(entry, 'id', where)!r})"):
                if prompt.attack in chosen["subset"]:
                    yield prompt


def _prompts(entry: dict[str, Any], part: str, root: Path, where: str) -> Iterator[Prompt]:
    safe, group, category = entry.get("safe"), f"{part}/{entry['id']}", "none"
    if not isinstance(safe, bool):
        raise DataError(f'{where} has {safe!r} as "safe"; it must be true or false.')
    if not safe:
        category = "/".join(text_in(entry, key, where) for key in ("harmful_category", "harmful_subcategory"))
    name = text_in(entry, "image", where)
    picture = pictured(where, *[root / folder / name for folder in (part, f"VLGuard/{part}", ".")])
    instructions = dict(ChainMap(*entry.get("instr-resp", [])))
    for subset in ("safe_safes", "safe_unsafes") if safe else ("unsafes",):
        yield Prompt(
            name=f"{group}/{subset}",
            prompt=text_in(instructions, INSTRUCTIONS[subset], where),
            label=0 if subset == "safe_safes" else 1,
            group=group,
            category=category,
            attack=subset,
            **picture,
        )
