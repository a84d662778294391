"""Checks whether an ONNX directory can be made, and writes its card and manifest."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sasa_export.models import Source, read_config
from sasa_export.models.family import onnx_recipes
from sasa_export.models.load import stock_config
from sasa_export.onnx import SUFFIX
from sasa_export.onnx.memory import check_memory
from sasa_export.onnx.recipes import check_tower
from sasa_export.options import Options
from sasa_export.report import Check
from sasa_export.writers.card import write_card
from sasa_export.writers.directory import Patch

PACKAGES = ("onnx", "onnx-ir", "onnxscript")


def check_possible(source: Source, options: Options) -> None:
    """Raise EmitError, before any work, where the ONNX directory cannot be made."""
    for package in ("onnx", "onnx_ir", "onnxruntime", "onnxscript"):  # a lean installation lacks them
        importlib.import_module(package)
    config = stock_config(source)
    check_tower(config.model_type, config.vision_config.model_type)
    check_memory(source, options)


def write_onnx_card(patch: Patch, checks: Sequence[Check], options: Options, directory: Path) -> None:
    """Write README.md into an ONNX directory."""
    config, dtype = read_config(directory), patch.gate.dtype or ""
    (model_class, *_) = config.get("architectures") or [None]
    write_card(
        patch, checks, options.verify, directory, "onnx_card.md.j2", dtype=dtype, suffix=SUFFIX.get(dtype),
        recipe=onnx_recipes().get(config["model_type"]), model_class=model_class,
    )  # fmt: skip


def made_with() -> dict[str, Any]:
    """Return entries of the manifest: the versions of the packages that made and ran the graphs."""
    import onnxruntime  # installed under one of two names, so the module tells the version

    return {"packages": PACKAGES, "onnxruntime": onnxruntime.__version__}
