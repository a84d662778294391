"""The whole ONNX directory, made from a finished one for transformers: whether it can be, its files, its manifest."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sasa_export.manifest import write_manifest
from sasa_export.models import Source
from sasa_export.models.load import stock_config
from sasa_export.options import Options
from sasa_export.writers.cases import FOLDER
from sasa_export.writers.directory import LICENCES
from sasa_export.writers.onnx.export import export
from sasa_export.writers.onnx.memory import check_memory
from sasa_export.writers.scores import SCORES

PACKAGES = ("onnx", "onnx-ir", "onnxscript")


def check_possible(source: Source, options: Options) -> None:
    """Raise EmitError before any work where the ONNX directory could not be made."""
    from sasa_export.writers.onnx.recipes import check_tower

    for package in ("onnx", "onnx_ir", "onnxruntime", "onnxscript"):  # a lean installation has none
        importlib.import_module(package)
    config = stock_config(source)
    check_tower(config.model_type, config.vision_config.model_type)
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


def write_onnx_manifest(out: Path, known: dict[str, str], **entries: Any) -> None:
    """Write the manifest of a verified directory, with the versions of what made its graphs and ran them."""
    import onnxruntime  # one package by two names, of which its version says nothing

    write_manifest(out, known, packages=PACKAGES, onnxruntime=onnxruntime.__version__, **entries)
