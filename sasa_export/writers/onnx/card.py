"""The model card of an ONNX directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sasa_export.models import read_config
from sasa_export.options import Options
from sasa_export.report import Check
from sasa_export.writers.card import write_card
from sasa_export.writers.directory import Patch
from sasa_export.writers.onnx import SUFFIX


def write_onnx_card(patch: Patch, checks: Sequence[Check], options: Options, directory: Path) -> None:
    """Write README.md into an ONNX directory."""
    from sasa_export.writers.onnx.recipes import recipe_of

    config = read_config(directory)
    write_card(
        patch, checks, options.verify, directory, "onnx_card.md.j2",
        opset=options.opset,
        dtype=options.onnx_dtype,
        suffix=SUFFIX[options.onnx_dtype],
        position_axes=recipe_of(config["model_type"]).position_axes,
        model_type=config["model_type"],
        model_class=config["architectures"][0],
    )  # fmt: skip
