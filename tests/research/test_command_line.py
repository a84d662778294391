"""The command that stands in a report."""

from pathlib import Path

from sasa_export.research.options import EvaluateOptions, LocateOptions
from sasa_export.research.report import command_line


def test_only_what_differs_from_the_defaults(tmp_path: Path) -> None:
    """It names no place of this machine, and flags come as the command line takes them."""
    (tmp_path / "my model").mkdir()
    options = EvaluateOptions(
        tmp_path / "my model", tmp_path / "out", data=("xstest:x.csv", "b.jsonl"), limit=7, device="cpu", force=True
    )
    said = "sasa-export evaluate --model 'my model' --data xstest:x.csv --data b.jsonl --limit 7"
    assert command_line("evaluate", options) == f"{said} --out report"
    located = LocateOptions("smol-llava", tmp_path / "out", pairs="13:15")
    said = "sasa-export locate --model smol-llava --pairs 13:15"
    assert command_line("locate", located) == f"{said} --out report"
