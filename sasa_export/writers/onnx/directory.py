"""What lies around the graphs of an ONNX directory: whether they can be made, its card, its manifest."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sasa_export.manifest import write_manifest
from sasa_export.models import Source, read_config
from sasa_export.models.load import stock_config
from sasa_export.options import Options
from sasa_export.report import Check
from sasa_export.writers.card import write_card
from sasa_export.writers.directory import Patch
from sasa_export.writers.onnx import SUFFIX
from sasa_export.writers.onnx.memory import check_memory

PACKAGES = ("onnx", "onnx-ir", "onnxscript")


def check_possible(source: Source, options: Options) -> None:
    """Raise EmitError before any work where the ONNX directory could not be made."""
    from sasa_export.writers.onnx.recipes import check_tower

    for package in ("onnx", "onnx_ir", "onnxruntime", "onnxscript"):  # a lean installation has none
        importlib.import_module(package)
    config = stock_config(source)
    check_tower(config.model_type, config.vision_config.model_type)
    check_memory(source, options)


def write_onnx_card(patch: Patch, checks: Sequence[Check], options: Options, directory: Path) -> None:
    """Write README.md into an ONNX directory."""
    from sasa_export.writers.onnx.recipes import recipe_of

    config = read_config(directory)
    write_card(
        patch, checks, options.verify, directory, "onnx_card.md.j2",
        opset=options.opset, dtype=options.onnx_dtype, suffix=SUFFIX[options.onnx_dtype],
        position_axes=recipe_of(config["model_type"]).position_axes,
        model_type=config["model_type"], model_class=config["architectures"][0],
    )  # fmt: skip


def write_onnx_manifest(out: Path, known: Mapping[str, str | None], **entries: Any) -> None:
    """Write the manifest of a verified directory, with the versions of what made its graphs and ran them."""
    import onnxruntime  # one package by two names, of which its version says nothing

    write_manifest(out, known, packages=PACKAGES, onnxruntime=onnxruntime.__version__, **entries)
