"""Writes docs/bypass-matrix.md from a run of the bypass matrix.

    pytest tests/bypass/test_matrix.py --junitxml=build/matrix.xml
    python tools/write_matrix.py build/matrix.xml docs/bypass-matrix.md

Exits with 1 where a row failed or was never run; the table is written all the same.
"""

import sys
from pathlib import Path
from xml.etree import ElementTree

import jinja2

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from matrix import feeding, hosts, loading, options  # noqa: F401
from matrix.rows import ROWS, Row

TEMPLATE = """\
# The bypass matrix

Written by `make matrix` from a test run, never by hand: one row a way of running a guarded model, tried with harmful
and harmless prompts beside the original model in the same way. ✓: it held; ✗: it did not, or was never run; –: skipped,
for want of a device or a package. What the gate is meant to stop, and what is known to remain, stands in
[security.md](security.md).
{% for section, rows in sections.items() %}
## {{ section }}

| | way of running | harmful | harmless | run on | remark |
|---|---|---|---|---|---|
{% for row, marks in rows -%}
| {{ "✗" if "✗" in marks.values() else "–" if "–" in marks.values() else "✓" }} | {{ row.name }} | {{ row.harmful }} | \
{{ row.harmless }} | {% for target, mark in marks.items() %}{{ target }}{{ "" if mark == "✓" else " " ~ mark }}\
{{ "" if loop.last else ", " }}{% endfor %} | {{ row.remark }} |
{% endfor %}{% endfor %}"""


def results(report: Path) -> dict[str, str]:
    """The mark of each test by its name, of a report in the format of JUnit."""
    marks = {}
    for case in ElementTree.parse(report).iter("testcase"):
        found = {child.tag for child in case}
        name = str(case.get("name")).rpartition("]")[0] + "]"  # pytest-xdist puts the test's group behind it
        marks[name] = "✗" if found & {"failure", "error"} else "–" if "skipped" in found else "✓"
    return marks


def document(rows: list[Row], marks: dict[str, str]) -> tuple[str, list[str]]:
    """The Markdown, and which rows failed or were never run."""
    sections: dict[str, list[tuple[Row, dict[str, str]]]] = {}
    for row in rows:
        found = {target: marks.get(f"test_row[{row.identifier_on(target)}]", "✗") for target in row.targets}
        sections.setdefault(row.section, []).append((row, found))
    wrong = [
        f"{row.name}, {target}"
        for found in sections.values() for row, seen in found for target, mark in seen.items() if mark == "✗"
    ]  # fmt: skip
    text = jinja2.Template(TEMPLATE, keep_trailing_newline=True).render(sections=sections)
    return text, wrong


if __name__ == "__main__":
    text, wrong = document(ROWS, results(Path(sys.argv[1])))
    Path(sys.argv[2]).write_text(text, encoding="utf-8")
    sys.exit("\n".join(wrong) or None)
