"""The table of the bypass matrix: what it says of rows that hold, fail, were skipped, or were never run."""

from pathlib import Path

import write_tables
from matrix.rows import LLAVA, THREE, Row

REPORT = """<testsuites><testsuite>
<testcase name="test_row[good_llava]@llava"/><testcase name="test_row[good_gemma3]"/>
<testcase name="test_row[good_qwen2_5_vl]"/>
<testcase name="test_row[bad_llava]"><failure message="x">y</failure></testcase>
<testcase name="test_row[left_llava]"><skipped message="no GPU"/></testcase>
</testsuite></testsuites>"""


def test_each_kind_of_row(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT, encoding="utf-8")
    names = {"good": THREE, "bad": LLAVA, "left": LLAVA, "lost": LLAVA}
    rows = [Row("Ways", name, lambda bench: None, on=on) for name, on in names.items()]
    text, wrong = write_tables.matrix_page(write_tables.results([tmp_path / "report.xml"]), rows)
    assert "## Ways\n\n| | way of running |" in text
    assert "| ✓ | good | refused | unchanged | llava, gemma3, qwen2_5_vl |  |\n| ✗ | bad | refused |" in text
    assert "| – | left | refused | unchanged | llava – |  |\n| ✗ | lost |" in text
    assert wrong == ["bad, llava", "lost, llava"]
