"""The options of an export, as one frozen dataclass. It also defines the flags of the command line."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import click

from sasa_export.errors import SasaExportError
from sasa_export.flags import Number, OptionSet, WordOr, option

AUTO, REACH = "auto", 8  # REACH: the default of --lane-tokens
DTYPES = ("auto", "float32", "bfloat16", "float16")
ONNX_DTYPES = ("float32", "float16", "int8", "int4")
OPSETS = (20, 23)
GATES = ("enforce", "observe")
TORCH_ALONE = ("revision", "projection", "opset", "onnx_dtype", "dtype")  # options that ONNX graphs do not take
REFUSAL = "I'm sorry, but I cannot help with that request."

# Help texts that several commands share.
REVISION = "Branch, tag or commit of a model on the hub. Default: its main branch."
ONNX_FILE = (
    "Of a directory of ONNX graphs with several variants, the one that is meant: a file, or what its name ends with, "
    "such as q4. Several times for decoder, embedding and vision encoder."
)
DEVICE = (
    "auto, cpu, cuda, cuda:1 ..., or spread, over all devices, memory and disk, as auto does where one device has no "
    "room for the model."
)

rare = partial(option, hidden=True)  # only --help-all shows these
PATH = click.Path(path_type=Path)
COUNT = click.IntRange(1)
LAYER = WordOr(AUTO, click.INT)
LANE_TOKENS = (
    "How many tokens the second lane runs over, back from the one where the verdict is due, those of the chat template "
    "among them."
)


@dataclass(frozen=True)
class Options(OptionSet):
    """The options of `patch`."""

    model: str = option("", "Alias, hub id (owner/name) or local directory.", required=True)
    out: Path = option(Path(), "Directory to write the patched model to.", PATH, required=True)
    force: bool = option(False, "Replace what an earlier export wrote to --out, and discard other unfinished work.")
    link: bool = rare(
        False,
        "Hard-link the original shards instead of copying them: no time, no space. Whoever later writes into "
        "one of the two directories in place then changes both.",
    )
    onnx_file: tuple[str, ...] = rare((), ONNX_FILE, multiple=True)
    revision: str | None = rare(None, REVISION)

    safety_layer: int | str | None = option(
        None,
        "Zero-based block whose output is projected, or auto: found on the calibration prompts, as the other layer "
        "is unless it is given. Default: what the family's file says.",
        LAYER,
    )
    semantic_layer: int | str | None = option(
        None,
        "Zero-based block onto whose output it is projected, or auto. Default: likewise.",
        LAYER,
    )
    projection: str = rare(
        "semantic",
        "semantic: the safety layer's output is projected onto the semantic layer's, and a second lane runs on it. "
        "none: the probe reads the end of the main lane, which costs nothing more.",
        click.Choice(("semantic", "none")),
    )
    lane_tokens: int = rare(REACH, LANE_TOKENS, COUNT)

    calibration: tuple[str, ...] = option(
        (),
        'Labelled prompts, a JSON object a line: {"image": path or null, "prompt": text, "label": 0 or 1}. Or a data '
        "set of the field as name:PATH, options behind commas: mm-safetybench, figstep, vlguard, jailbreakv, xstest. "
        "Give it several times to combine them; builtin is the built-in set, which is the default.",
        multiple=True,
    )
    probe: Path | None = option(None, "A probe of your own (sasa.probe.weight, sasa.probe.bias): no calibration.", PATH)
    threshold: float | None = option(
        None,
        "Refuse from this P(unsafe) on. Default: from the calibration, or 0.5 with --probe.",
        Number(0, 1, min_open=True, max_open=True),
    )
    max_false_positive_rate: float = option(
        0.02,
        "Largest share of ordinary harmless calibration prompts that the threshold may refuse.",
        Number(0, 1, max_open=True),
    )
    regularization: float | str = rare(
        "auto",
        "The probe's C in scikit-learn, its inverse strength of regularization: a number (the paper's is 1), or "
        "auto, by cross-validation.",
        WordOr(AUTO, Number(0, inf, min_open=True, max_open=True)),
    )
    refusal: str = option(REFUSAL, "What the model says when it refuses.")
    gate: str = option(
        "enforce",
        "enforce: refuse. observe: judge, report P(unsafe) and refuse nothing. config.json changes it later; graphs "
        "of ONNX are exported again.",
        click.Choice(GATES),
    )

    format: str = option(
        "safetensors",
        "safetensors: a directory for transformers. onnx: one that ONNX runtimes load as any other model. both: "
        "safetensors/ and onnx/ below --out.",
        click.Choice(("safetensors", "onnx", "both")),
    )
    opset: int = rare(
        23,
        "Operator set: 23 keeps attention, rotary embedding and RMS norm as single operators; 20 loads in older "
        "runtimes.",
        click.Choice(OPSETS),
    )
    onnx_dtype: str = option(
        "float32",
        "Type of the graphs. int8 and int4 are of the weights alone. The gate computes in float32 in all of them.",
        click.Choice(ONNX_DTYPES),
    )

    batch_size: int = rare(16, "Prompts at a time in calibration.", COUNT)
    device: str = option("auto", f"Where the model runs: {DEVICE}")
    dtype: str = rare("auto", "Type the model runs in while it is calibrated and verified.", click.Choice(DTYPES))
    verify: str = option(
        "full",
        "full: load what was written in a fresh process and compare it with the original. files: check what "
        "needs no model in memory, for models larger than the machine.",
        click.Choice(("full", "files")),
    )

    def finds_layers(self) -> bool:
        """Return whether a layer has to be found on the calibration prompts."""
        return AUTO in (self.safety_layer, self.semantic_layer)

    def check(self) -> None:
        """Raise SasaExportError where options contradict each other or have no effect."""
        if not self.refusal.strip():
            raise SasaExportError("--refusal is empty, and the model says it where it refuses. Give a sentence.")
        if self.probe is not None and self.calibration:
            raise SasaExportError("--probe and --calibration exclude each other: a given probe is not fitted.")
        if self.probe is not None and self.finds_layers():
            raise SasaExportError(
                f"--probe and layers left to {AUTO} exclude each other: a probe belongs to the layers it was fitted "
                "on. Give both layers."
            )
        if self.projection == "none":
            names = ("safety_layer", "semantic_layer", "lane_tokens")
            self.check_default(*names, why="has no effect with --projection none, which has no second lane")
        if self.format == "safetensors":
            self.check_default("opset", "onnx_dtype", why="has no effect without --format onnx or both")
        if self.probe is not None:
            names = ("regularization", "max_false_positive_rate", "batch_size")
            self.check_default(*names, why="has no effect with --probe, since nothing is calibrated")
        if self.threshold is not None and not self.finds_layers():
            self.check_default("max_false_positive_rate", why="has no effect with --threshold, which it would choose")

    def to_json(self) -> dict[str, Any]:
        """Return every option that shapes the result. Output path, linking, batch size and device do not."""
        left_out = ("out", "force", "link", "batch_size", "device")
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in left_out}
        values["calibration"] = list(self.calibration) or None
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def number_of(value: float | str) -> float | None:
    """Return the number that an option has, or None for auto."""
    return None if value == AUTO else float(value)


def check_for_graphs(options: OptionSet) -> None:
    """Raise SasaExportError where an option cannot be used with ONNX graphs that others exported."""
    options.check_default(*TORCH_ALONE, why="is not of use with ONNX graphs")
    if getattr(options, "format", "") == "both":
        raise SasaExportError("--format both is not of use with ONNX graphs. Leave it out.")
    if (device := getattr(options, "device", AUTO)) not in (AUTO, "cpu"):
        raise SasaExportError(f"--device {device} is not of use with ONNX graphs: they run on the CPU. Leave it out.")
