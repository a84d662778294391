"""Writes docs/artefact.md and docs/faults.md from what the tests measured.

    SASA_RECORDS=build/records make test ARGS="tests/test_artefact.py ..."
    python tests/tables.py build/records

`make fuzz` does both, with many more inputs and faults than the test suite tries by default.
"""

import re
import sys
from pathlib import Path
from typing import Any

from records import rows

DOCS = Path(__file__).parents[1] / "docs"
LONGEST = 160  # characters of what an error says

ARTEFACT = """\
# What a guarded directory does in other hands

Written by `make fuzz` from a test run, never by hand: `tests/test_artefact.py`, `test_fail_closed.py`,
`test_tampering.py` and `test_source_files.py`. ✓ means that it fails closed, or keeps the gate where that is said.
"""
GROUPS = {
    "loaders": ("Loaders", "Tried on six model types, or as often as the second column says."),
    "tampering": (
        "Changes that stop it from loading",
        "With `trust_remote_code=True`, without this tool.",
    ),
    "verify": (
        "Changes that `sasa-export verify` names",
        "A guarded model loads, of other files.",
    ),
    "sources": ("Source models that are refused", "Before anything of them is run, loaded or copied."),
}
LIMITS = """\
## What no file can defend itself against

Whoever holds the directory holds the weights. Deleting the seals and naming a stock type in `config.json`, loading the
shards through code of one's own, or computing a new fingerprint for edited settings takes intent, not an accident;
`sasa-export verify` tells the files from the exported ones as long as `sasa-export.json` is the exported one too.
"""
FAULTS = """\
# Faults and bad inputs

Written by `make fuzz` from a test run, never by hand: `tests/test_faults.py` and `tests/test_fuzz_*.py`. A row is only
written where all of its tries went well.
"""
FAULTS_HEAD = """\
## Faults

After each: the old output or the whole new one stands at `--out`, nothing half-written, and the same command then
succeeds and leaves nothing beside its output. A point is one operation that changes a file or a directory.

| fault | tried | points in the run |
|---|---|---|"""
FUZZ_HEAD = """\
## Bad inputs

Each ends well or in an error of one line, never in a traceback; and whatever a guarded model or graph is given, no row
is answered whose P(unsafe) is at or above the threshold, NaN, or not there.

| input | tried |
|---|---|"""


def cell(text: str, longest: int = 10_000) -> str:
    """Text that fits into a cell of a Markdown table."""
    text = re.sub(r"(/[\w.-]+)*/pytest-[^\s'\"`)]*|https?:\S+", "...", text)  # no place of this machine, or of the net
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= longest else text[: longest - 3] + "..."


def artefact(found: list[dict[str, Any]]) -> str:
    parts = [ARTEFACT]
    for group, (head, text) in GROUPS.items():
        parts += [f"## {head}\n\n{text}", "", "| what | tried | | what it says |", "|---|---|---|---|"]
        for row in found:
            if row["group"] == group:
                mark = "✓" if row["good"] else "✗"
                parts.append(f"| {cell(row['what'])} | {row['tried']} | {mark} | {cell(row['says'], LONGEST)} |")
        parts.append("")
    return "\n".join([*parts, LIMITS])


def faults(found: list[dict[str, Any]]) -> str:
    parts = [FAULTS, FAULTS_HEAD]
    parts += [
        f"| {cell(row['what'])} | {row['tried']} | {row['of'] or ''} |" for row in found if row["group"] == "faults"
    ]
    inputs = [row for row in found if row["group"] == "fuzzing"]
    parts += ["", FUZZ_HEAD, *(f"| {cell(row['what'])} | {row['tried']:,} |" for row in inputs)]
    total = sum(row["tried"] for row in found)
    parts += ["", f"{total:,} in all, with nothing lost and nothing let through.", ""]
    return "\n".join(parts)


def main(directory: Path) -> None:
    for name, make in (("artefact", artefact), ("faults", faults)):
        found = rows(name, directory)
        if not found:
            sys.exit(f"{directory} holds no records of {name}: run the tests with SASA_RECORDS={directory} first.")
        (DOCS / f"{name}.md").write_text(make(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
