"""Directories that an earlier sasa-export wrote."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Guard

from sasa_export.errors import EvaluateError
from sasa_export.report import Silent
from sasa_export.research.evaluate.subject import open_subject
from sasa_export.research.options import EvaluateOptions
from sasa_export.verify.unloaded import check_files


def test_a_lane_over_all_tokens(guard: Callable[..., Guard], tmp_path: Path) -> None:
    """It is verified as ever, by its own code; an evaluation would fit other probes than its own, and says so."""
    directory = Path(shutil.copytree(guard("llava").directory, tmp_path / "copy"))
    config = json.loads((directory / "config.json").read_text())
    config["sasa"]["format"] = 3
    for node in config["sasa"]["graph"]:
        node.pop("tokens", None)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "sasa-export.json").unlink()
    checks = {check.name: check for check in check_files(directory)}
    assert checks["config.json is guarded and sealed"].passed
    with pytest.raises(EvaluateError, match="of an earlier sasa-export, whose probe read less"):
        open_subject(EvaluateOptions(directory, tmp_path / "out"), Silent())
