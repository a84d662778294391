"""What tests measured, as rows for the tables in docs/ (see tools/tables.py).

Rows are kept only where the environment variable SASA_RECORDS names a directory for them.
"""

import json
import os
from pathlib import Path
from typing import Any


def note(table: str, **row: Any) -> None:
    """Add a row to a table; each process has a file of its own."""
    directory = os.environ.get("SASA_RECORDS")
    if directory:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with Path(directory, f"{table}-{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def rows(table: str, directory: Path) -> list[dict[str, Any]]:
    """All rows of a table, whichever process noted them; a row noted again replaces the earlier one."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(directory.glob(f"{table}-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found[json.dumps([row.get("group"), row.get("what")])] = row
    return list(found.values())
