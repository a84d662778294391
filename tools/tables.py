"""Writes build/artefact.md and build/faults.md from what the tests measured.

    SASA_RECORDS=build/records make test ARGS="tests/bypass/test_artefact.py ..."
    python tools/tables.py build/records

`make fuzz` does both, with many more inputs and faults than the test suite tries by default.
"""

import re
import sys
from pathlib import Path

import jinja2

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from records import rows

BUILD = Path(__file__).parents[1] / "build"

ARTEFACT = """\
# What a guarded directory does in other hands

Written by `make fuzz` from a test run, never by hand: `test_artefact.py` and `test_fail_closed.py` of `tests/bypass/`,
`tests/models/test_source_files.py`. ✓ means that it fails closed, or keeps the gate where that is said.

{% for group, heading in {
    "loaders": "Loaders\\n\\nTried on six model types, or as often as the second column says.",
    "tampering": "Changes that stop it from loading\\n\\nWith `trust_remote_code=True`, without this tool.",
    "verify": "Changes that `sasa-export verify` names\\n\\nA guarded model loads, of other files.",
    "sources": "Source models that are refused\\n\\nBefore anything of them is run, loaded or copied.",
}.items() -%}
## {{ heading }}

| what | tried | | what it says |
|---|---|---|---|
{% for row in found if row.group == group -%}
| {{ row.what | cell }} | {{ row.tried }} | {{ "✓" if row.good else "✗" }} | {{ row.says | cell | truncate }} |
{% endfor %}
{% endfor -%}
## What no file can defend itself against

Whoever holds the directory holds the weights. Deleting the seals and naming a stock type in `config.json`, or loading
the shards through code of one's own, takes intent, not an accident; `sasa-export verify` tells the files from the
exported ones as long as `sasa-export.json` is the exported one too.
"""
FAULTS = """\
# Faults and bad inputs

Written by `make fuzz` from a test run, never by hand: `test_faults.py`, `test_fuzz_*.py`. A row is only written
where all of its tries went well.

## Faults

After each: the old output or the whole new one stands at `--out`, nothing half-written, and the same command then
succeeds and leaves nothing beside its output. A point is one operation that changes a file or a directory.

| fault | tried | points in the run |
|---|---|---|
{% for row in found if row.group == "faults" -%}
| {{ row.what | cell }} | {{ row.tried }} | {{ row.of or "" }} |
{% endfor %}
## Bad inputs

Each ends well or in an error of one line, never in a traceback; and whatever a guarded model or graph is given, no row
is answered whose P(unsafe) is at or above the threshold, NaN, or not there.

| input | tried |
|---|---|
{% for row in found if row.group == "fuzzing" -%}
| {{ row.what | cell }} | {{ "{:,}".format(row.tried) }} |
{% endfor %}
{{ "{:,}".format(found | sum(attribute="tried")) }} in all, with nothing lost and nothing let through.
"""


def cell(text: str) -> str:
    """Text that fits into a cell of a Markdown table, with no place of this machine or of the net."""
    text = re.sub(r"(/[\w.-]+)*/pytest-[^\s'\"`)]*|https?:\S+", "...", text)
    return " ".join(text.split()).replace("|", "\\|")


def main(directory: Path) -> None:
    environment = jinja2.Environment(keep_trailing_newline=True)
    environment.filters["cell"] = cell
    for name, template in (("artefact", ARTEFACT), ("faults", FAULTS)):
        found = rows(name, directory)
        if not found:
            sys.exit(f"{directory} holds no records of {name}: run the tests with SASA_RECORDS={directory} first.")
        text = environment.from_string(template).render(found=found)
        (BUILD / f"{name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
