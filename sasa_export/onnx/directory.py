"""Checks whether an ONNX directory can be made, and writes its card and manifest."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sasa_export.manifest import write_manifest
from sasa_export.models import Source, read_config
from sasa_export.models.load import stock_config
from sasa_export.onnx import SUFFIX
from sasa_export.onnx.memory import check_memory
from sasa_export.options import Options
from sasa_export.report import Check
from sasa_export.writers.card import write_card
from sasa_export.writers.directory import Patch

PACKAGES = ("onnx", "onnx-ir", "onnxscript")


def check_possible(source: Source, options: Options) -> None:
    """Raise EmitError, before any work, where the ONNX directory cannot be made."""
    from sasa_export.onnx.recipes import check_tower

    for package in ("onnx", "onnx_ir", "onnxruntime", "onnxscript"):  # a lean installation lacks them
        importlib.import_module(package)
    config = stock_config(source)
    check_tower(config.model_type, config.vision_config.model_type)
    check_memory(source, options)


def write_onnx_card(patch: Patch, checks: Sequence[Check], options: Options, directory: Path) -> None:
    """Write README.md into an ONNX directory."""
    from sasa_export.onnx.recipes import RECIPES

    config, dtype = read_config(directory), patch.gate.dtype or ""
    recipe = RECIPES.get(config["model_type"])
    write_card(
        patch, checks, options.verify, directory, "onnx_card.md.j2", dtype=dtype, suffix=SUFFIX.get(dtype),
        position_axes=recipe.position_axes if recipe else 1, model_type=config["model_type"],
        model_class=next(iter(config.get("architectures") or []), None),
    )  # fmt: skip


def write_onnx_manifest(out: Path, known: Mapping[str, str | None], **entries: Any) -> None:
    """Write the manifest of a verified directory, with the versions of the packages that made and ran its graphs."""
    import onnxruntime  # installed under one of two names, so the module tells the version

    write_manifest(out, known, packages=PACKAGES, onnxruntime=onnxruntime.__version__, **entries)
