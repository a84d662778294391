"""Writes docs/bypass-matrix.md from what the rows of the bypass matrix found.

    SASA_MATRIX_OUT=build/matrix make test ARGS="-k matrix"
    python tests/write_matrix.py build/matrix docs/bypass-matrix.md

Exits with 1 where a row has no finding, or failed; the table is written all the same.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matrix import load
from matrix.outcome import ROWS, Row
from tables import cell

RUNTIMES = {
    "torch": (
        "transformers",
        "Tiny random models, patched, beside the stock model in the same way of running.",
    ),
    "onnxruntime": (
        "onnxruntime",
        "Tiny random models as ONNX graphs, beside the stock model in torch, or beside a plain graph of the same type. "
        "A graph cannot raise an error: what it cannot judge, it refuses.",
    ),
    "smol-llava": (
        "The embedded model",
        "smol-llava with a probe that is fitted to these prompts alone, asked what the demo asks: a harmful and a "
        "harmless request in a picture, and in text. `SASA_MATRIX_SLOW=1` runs these rows.",
    ),
}
HEAD = """\
# The bypass matrix

Written by `make matrix` from a test run, never by hand: one row a way of running a guarded model, tried with harmful
and harmless prompts. ✓ means that the harmful were refused and the harmless got the original model's tokens in the same
way of running, or that it ends in a loud error; ✗ that it did not; – that it was not run.

*refused*: the refusal was spelled and ended. *words of the refusal only*: an option forbids the wanted ones. *nothing
of the model's*: an option forbids all of them, and each logit is the same. *refused too*: fails closed. *not asked*: no
such prompt can be run in this way.
"""
SKIPPED = "Skipped: "
SHOWN = 20  # of what is wrong


@dataclass(frozen=True)
class Line:
    """A way of running: a mark, the cells behind it, and whether every family has a finding."""

    mark: str
    cells: tuple[str, ...]
    missing: tuple[str, ...]


def findings(directory: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """What was found, by runtime, name of the row and family."""
    found = {}
    for path in sorted(directory.glob("*.json")):
        one = json.loads(path.read_text(encoding="utf-8"))
        found[one["runtime"], one["name"], one["family"]] = one
    return found


def line(one: Row, found: dict[tuple[str, str, str], dict[str, Any]]) -> Line:
    """The families of a row in one line: it holds where all of them do."""
    seen = {family: found.get((one.runtime, one.name, family)) for family in one.families}
    missing = tuple(family for family, finding in seen.items() if finding is None)
    there = {family: finding for family, finding in seen.items() if finding is not None}
    failed = {family: each["failure"] for family, each in there.items() if each["failure"]}
    skipped = {family: text.removeprefix(SKIPPED) for family, text in failed.items() if text.startswith(SKIPPED)}
    outcomes = [each["outcome"] for each in there.values() if each["outcome"] and not each["failure"]]
    remarks = [outcome["remark"] for outcome in outcomes if outcome["remark"]]
    remarks += [f"{family} failed: {text}" for family, text in failed.items() if family not in skipped]
    remarks += [f"{family} was not run: {text}" for family, text in skipped.items()]
    remarks += [f"{', '.join(missing)}: not run"] if missing else []
    if failed.keys() - skipped.keys():
        mark = "✗"
    elif outcomes and not missing and not skipped:
        mark = "✓"
    else:
        mark = "–"
    harmful, harmless = (
        " / ".join(dict.fromkeys(outcome[kind] for outcome in outcomes)) for kind in ("harmful", "harmless")
    )
    families = ", ".join(there.keys() - skipped.keys() if mark != "✓" else one.families)
    texts = (one.name, harmful, harmless, families, "; ".join(dict.fromkeys(remarks)))
    return Line(mark, tuple(cell(text) for text in texts), missing)


def document(found: dict[tuple[str, str, str], dict[str, Any]]) -> tuple[str, list[str]]:
    """The Markdown, and what is wrong: rows without a finding, and rows that failed."""
    parts, wrong = [HEAD], []
    for runtime, (title, about) in RUNTIMES.items():
        rows = [one for one in ROWS if one.runtime == runtime]
        lines = [(one, line(one, found)) for one in rows]
        good = sum(each.mark == "✓" for _, each in lines)
        unrun = sum(each.mark == "–" for _, each in lines)
        bad = len(lines) - good - unrun
        parts += [f"## {title}", f"{about}\n\n{len(lines)} ways: {good} ✓, {bad} ✗, {unrun} not run."]
        for section in dict.fromkeys(one.section for one in rows):
            table = ["| | way of running | harmful | harmless | families | remark |", "|---|---|---|---|---|---|"]
            for one, each in lines:
                if one.section == section:
                    table.append(f"| {each.mark} | " + " | ".join(each.cells) + " |")
            parts += [f"### {section}", "\n".join(table)]
        for one, each in lines:
            if each.missing:
                wrong.append(f"{runtime}: {one.name} has no finding for {', '.join(each.missing)}")
            elif each.mark == "✗":
                wrong.append(f"{runtime}: {one.name} failed")
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n", wrong


def main(directory: Path, out: Path) -> None:
    load()
    text, wrong = document(findings(directory))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    if wrong:
        more = [f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
        sys.exit("\n".join([*wrong[:SHOWN], *more, f"{len(wrong)} rows have no finding, or failed: run them again."]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
