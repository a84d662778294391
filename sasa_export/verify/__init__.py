"""Verifies a patched directory: checks its files, runs it in a fresh process, and compares it with the original."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from sasa_export.errors import VerifyError
from sasa_export.onnx import graphs_of
from sasa_export.report import Check
from sasa_export.runtime.bundle import MODELING_FILE
from sasa_export.verify.answers import LOADS, NOT_COMPARED, check_written
from sasa_export.verify.unloaded import check_manifest, is_ours

FORMATS = ("safetensors", "onnx")  # the two directories of --format both

__all__ = ["FORMATS", "Check", "check_written", "verify_directory"]


def verify_directory(
    directory: Path | str, *, device: str = "cpu", only_files: bool = False, load: str | None = None
) -> list[Check]:
    """Check a patched directory: its files, and, unless `only_files`, the model in a fresh process.

    The two directories of `--format both` are checked one after the other. If a model was saved again, the check of its
    files has None as `passed`. `load` names a quantization (loads.json) with which the model is loaded.

    Raises SasaExportError where the directory holds nothing to check, or the model does not load.
    """
    directory = Path(directory)
    both = [directory / name for name in FORMATS]
    if not (directory / "config.json").exists() and all((path / "config.json").exists() for path in both):
        verify = partial(verify_directory, device=device, only_files=only_files, load=load)
        return [check for path in both for check in verify(path)]
    manifest = check_manifest(directory)
    graphs = bool(graphs_of(directory))
    if load is not None and (graphs or only_files or load not in LOADS):
        why = f"has no {load}. Choose one of: {', '.join(LOADS)}"
        why = "needs a directory of safetensors, and no --files" if graphs or only_files else why
        raise VerifyError(f"--load {why}.")
    # Loading runs the directory's code. The code is trusted only if the manifest vouches for every file, or the code
    # is exactly what this version writes. Directories of graphs hold no code.
    trusted = graphs or (is_ours(directory) if manifest.passed is None else manifest.passed)
    checks = check_written(directory, device=device, only_files=only_files or not trusted, load=load)
    if manifest.passed is None and not only_files and not trusted:
        why = (
            f"not checked, since no manifest vouches for its code, which is not what is written as {MODELING_FILE} here"
        )
        checks.append(replace(NOT_COMPARED, detail=why))
    return [manifest, *checks]
