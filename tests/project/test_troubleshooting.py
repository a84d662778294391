"""Every message on the page of troubleshooting is one that the code has."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = [path for part in ("sasa_export", "serving/src", "tools") for path in (ROOT / part).rglob("*.py")]


def texts() -> str:
    """Return all strings of the code, with ... for each value of a formatted one."""
    lines = ["Missing option"]  # Click's own
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
                lines.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                lines.append(node.value)
    return "\n".join(lines)


def test_the_messages_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    messages = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 100
    code = texts()
    assert [message for message in messages if message not in code] == []
