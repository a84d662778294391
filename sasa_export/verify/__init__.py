"""Verify: check the files of what was written, run it in a fresh process, and compare it with the original."""

from __future__ import annotations

from pathlib import Path

from sasa_export.probe import Calibration
from sasa_export.report import Check
from sasa_export.verify.answers import NOT_COMPARED, check_answers
from sasa_export.verify.files import check_files, check_manifest
from sasa_export.verify.onnx import check_graphs, dtype_of
from sasa_export.verify.verdicts import ChangedVerdicts

FORMATS = ("safetensors", "onnx")  # the two directories of --format both

__all__ = ["FORMATS", "Check", "check_written", "verify_directory"]


def verify_directory(directory: Path | str, *, device: str = "cpu", only_files: bool = False) -> list[Check]:
    """Check a patched directory: its files, and, unless `only_files`, the model in a fresh process.

    What `--format both` wrote is checked one directory after the other. A check that could not be made, of a directory
    that was saved again or exported with `--verify files`, has None as `passed`.

    Raises SasaExportError where there is nothing to check, or the model does not even load.
    """
    directory = Path(directory)
    both = [directory / name for name in FORMATS]
    if not (directory / "config.json").exists() and all((path / "config.json").exists() for path in both):
        return [check for path in both for check in verify_directory(path, device=device, only_files=only_files)]
    manifest = check_manifest(directory)
    if manifest.passed is False and dtype_of(directory) is not None:
        return [manifest]  # the graphs are read by rules that changed files need not keep
    # Loading runs the directory's code, which is trusted only where the manifest knows every file.
    checks, _ = check_written(directory, device=device, only_files=only_files or not manifest.passed)
    return [manifest, *checks, *([NOT_COMPARED] if manifest.passed is None and not only_files else [])]


def check_written(
    directory: Path,
    *,
    device: str = "cpu",
    only_files: bool = False,
    calibration: Calibration | None = None,
    count: int = 0,
    most: float = 0.0,
) -> tuple[list[Check], ChangedVerdicts | None]:
    """All checks but that of the manifest, and how many verdicts of an export's calibration its graphs changed.

    See `check_answers` for the arguments; `only_files` makes no more checks than need no model in memory.
    """
    graphs = dtype_of(directory)
    checks = check_files(directory) if graphs is None else check_graphs(directory, graphs)
    if only_files or not all(check.passed for check in checks):
        return checks, None
    answers, changed = check_answers(directory, graphs, device=device, calibration=calibration, count=count, most=most)
    return [*checks, *answers], changed
