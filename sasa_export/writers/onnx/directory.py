"""The whole ONNX directory, made from a finished guarded one: room for it, its files, its card and manifest."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sasa_export.errors import EmitError
from sasa_export.manifest import write_manifest
from sasa_export.models import Source
from sasa_export.options import Options
from sasa_export.probe import Calibration
from sasa_export.verify.cases import FOLDER
from sasa_export.verify.check import Check
from sasa_export.verify.flips import Flips
from sasa_export.verify.onnx import runs_here
from sasa_export.writers.files import LICENCES
from sasa_export.writers.onnx import export
from sasa_export.writers.onnx.card import write_onnx_card
from sasa_export.writers.onnx.room import check_memory
from sasa_export.writers.scores import SCORES

PACKAGES = ("onnx", "onnx-ir", "onnxscript")
RUNTIMES = ("onnxruntime-gpu", "onnxruntime")  # one package by two names


def check_possible(source: Source, options: Options) -> None:
    """Raise EmitError before any work where the ONNX directory could not be made, or not be verified here."""
    from sasa_export.writers.onnx.recipes import recipe_of

    recipe_of(str(source.config["model_type"]))
    if options.verify == "full" and not runs_here(options.onnx_dtype):
        raise EmitError(
            f"--onnx-dtype {options.onnx_dtype} runs on onnxruntime's CUDA provider alone, which is not here, so it "
            "could not be verified. Export it on a machine with a GPU, take float16, or give --verify files."
        )
    check_memory(source, options)


def write_onnx_directory(
    patched: Path, out: Path, *, opset: int, dtype: str, advance: Callable[[str], None] = lambda step: None
) -> None:
    """Write everything but the card and the manifest, which tell what was verified, into the directory `out`."""
    export(patched, out, opset=opset, dtype=dtype, advance=advance)
    for pattern in (SCORES, *LICENCES):
        for path in sorted(patched.glob(pattern)):
            shutil.copyfile(path, out / path.name)
    if (patched / FOLDER).is_dir():
        shutil.copytree(patched / FOLDER, out / FOLDER)


def finish(
    source: Source,
    sasa: dict[str, Any],
    calibration: Calibration | None,
    checks: Sequence[Check],
    flips: Flips | None,
    options: Options,
    out: Path,
) -> None:
    """Write the card and the manifest of a verified directory; `flips` is None where none were counted."""
    write_onnx_card(source, sasa, calibration, checks, flips, options, out)
    write_manifest(
        out, {}, packages=(*PACKAGES, *_runtime()), options=options.to_json(), layers_from=sasa["layers_from"],
        flips=None if flips is None else flips.to_json(),
    )  # fmt: skip


def _runtime() -> list[str]:
    found = []
    for name in RUNTIMES:
        try:
            version(name)
        except PackageNotFoundError:
            continue
        found.append(name)
    return found
