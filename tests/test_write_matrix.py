"""The table of the bypass matrix: what it says of rows that hold, fail, were skipped, or were never run."""

from pathlib import Path

import pytest
import write_matrix
from matrix.outcome import HOLDS, ROWS, Outcome, Row, recorded


def tried(directory: Path, monkeypatch: pytest.MonkeyPatch, run: dict[str, object]) -> tuple[str, list[str]]:
    """The table of rows that end as `run` says, by name: with an outcome, an exception, or None where none was run."""
    ways = [Row("torch", "Ways", name, lambda bench: HOLDS, ("llava", "gemma3")) for name in run]
    monkeypatch.setattr(write_matrix, "ROWS", ways)
    monkeypatch.setenv("SASA_MATRIX_OUT", str(directory))
    for one in ways:
        for family, outcome in zip(one.families, (HOLDS, run[one.name]), strict=True):
            try:
                with recorded(one, family) as found:
                    if isinstance(outcome, BaseException):
                        raise outcome
                    found += [outcome] if isinstance(outcome, Outcome) else []
            except BaseException as error:
                assert error is outcome
            if outcome is None:
                (directory / f"torch-{one.identifier}-{family}.json").unlink()
    return write_matrix.document(write_matrix.findings(directory))


def test_each_kind_of_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skipped = pytest.skip.Exception("needs a GPU")
    failed = AssertionError("harmful | answered in /tmp/pytest-of-me/pytest-1/x")
    text, wrong = tried(
        tmp_path, monkeypatch, {"good": HOLDS.but("to the bit"), "bad": failed, "left": skipped, "lost": None}
    )
    lines = {line.split(" | ")[1]: line for line in text.splitlines() if line.startswith(("| ✓", "| ✗", "| –"))}
    assert lines["good"] == "| ✓ | good | refused | unchanged | llava, gemma3 | to the bit |"
    assert lines["bad"].startswith("| ✗ | bad |") and "harmful \\| answered in ..." in lines["bad"]
    assert lines["left"].startswith("| – | left | refused | unchanged | llava |") and "needs a GPU" in lines["left"]
    assert lines["lost"].startswith("| – | lost |") and "gemma3: not run" in lines["lost"]
    assert "4 ways: 1 ✓, 1 ✗, 2 not run." in text and "/tmp" not in text
    assert wrong == ["torch: bad failed", "torch: lost has no finding for gemma3"]


def test_it_fails_where_a_row_has_no_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_matrix, "load", lambda: None)
    monkeypatch.setattr(write_matrix, "ROWS", [Row("torch", "Ways", "lost", lambda bench: HOLDS, ("llava",))])
    with pytest.raises(SystemExit, match="lost has no finding for llava"):
        write_matrix.main(tmp_path, tmp_path / "docs" / "matrix.md")
    assert "| – | lost |" in (tmp_path / "docs" / "matrix.md").read_text()
    assert ROWS is not write_matrix.ROWS
