"""All settings of a patch, in one frozen value. The flags of the command line are made from it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sasa_export.errors import SasaExportError
from sasa_export.flags import option

AUTO = "auto"
DTYPES = ("auto", "float32", "bfloat16", "float16")
ONNX_DTYPES = ("float32", "float16", "int8", "int4")
OPSETS = (20, 23)
REFUSAL = "I'm sorry, but I cannot help with that request."


@dataclass(frozen=True)
class Options:
    """What `sasa-export --model ... --out ...` does, and with what."""

    model: str = option("", "Alias, hub id (owner/name) or local directory.", group="What", required=True)
    out: Path = option(Path(), "Directory to write the patched model to.", group="What", required=True)
    force: bool = option(False, "Replace the output directory if it is there and not empty.", group="What")
    link: bool = option(
        False,
        "Hard-link the original shards instead of copying them: no time, no space. Whoever later writes into "
        "one of the two directories in place then changes both.",
        group="What",
    )

    safety_layer: int | str | None = option(
        None,
        "Zero-based block whose output is projected, or auto: found on the calibration prompts, as the other layer "
        "is unless it is given. Default: what the family's file says.",
        group="Layers",
        word=AUTO,
    )
    semantic_layer: int | str | None = option(
        None,
        "Zero-based block onto whose output it is projected, or auto. Default: likewise.",
        group="Layers",
        word=AUTO,
    )
    projection: str = option(
        "semantic",
        "semantic: the safety layer's output is projected onto the semantic layer's, and a second lane runs on it. "
        "none: the probe reads the end of the main lane, which costs nothing more.",
        group="Layers",
        choices=("semantic", "none"),
    )
    epsilon: float = option(1e-6, "Least squared norm in the projection's denominator.", group="Layers")

    calibration: tuple[str, ...] = option(
        (),
        'Labelled prompts, a JSON object a line: {"image": path or null, "prompt": text, "label": 0 or 1}. Or a data '
        "set of the field as name:PATH, options behind commas: mm-safetybench, figstep, vlguard, jailbreakv, xstest. "
        "Give it several times to combine them. Default: the built-in set.",
        group="Probe",
    )
    probe: Path | None = option(
        None, "A probe of your own (sasa.probe.weight, sasa.probe.bias): no calibration.", group="Probe"
    )
    threshold: float | None = option(
        None,
        "Refuse from this P(unsafe) on. Default: from the calibration, or 0.5 with --probe.",
        group="Probe",
    )
    max_false_positive_rate: float = option(
        0.02, "Largest share of harmless calibration prompts that the threshold may refuse.", group="Probe"
    )
    regularization: str = option(
        "auto",
        "The probe's C in scikit-learn, its inverse strength of regularization: a number (the paper's is 1), or "
        "auto, by cross-validation.",
        group="Probe",
    )
    probe_block: int | None = option(
        None,
        "Block of the second lane that the probe reads, zero-based: the lane ends there and costs less. The safety "
        "layer's number stands for the projection itself. Default: the last block. `evaluate --depth-curve` measures "
        "what each is worth.",
        group="Probe",
    )
    refusal: str = option(REFUSAL, "What the model says when it refuses.", group="Probe")

    format: str = option(
        "safetensors",
        "safetensors: a directory for transformers. onnx: one that ONNX runtimes load as any other model. both: "
        "safetensors/ and onnx/ below --out.",
        group="ONNX",
        choices=("safetensors", "onnx", "both"),
    )
    opset: int = option(
        23,
        "Operator set: 23 keeps attention, rotary embedding and RMS norm as single operators; 20 loads in older "
        "runtimes.",
        group="ONNX",
        choices=OPSETS,
    )
    onnx_dtype: str = option(
        "float32",
        "Type of the graphs. int8 and int4 are of the weights alone. The gate computes in float32 in all of them.",
        group="ONNX",
        choices=ONNX_DTYPES,
    )
    max_changed_verdicts: float = option(
        0.02,
        "Largest share of the calibration prompts whose verdict the graphs may change, before nothing is written. "
        "The default is what the threshold itself may get wrong of the harmless ones.",
        group="ONNX",
    )
    verdict_prompts: int = option(
        200,
        "How many calibration prompts the graphs judge again, drawn evenly from labels and channels; all where there "
        "are no more.",
        group="ONNX",
    )

    batch_size: int = option(16, "Prompts at a time in calibration.", group="Running")
    device: str = option(
        "auto",
        "Where the model runs: auto, cpu, cuda, cuda:1 ..., or spread, over all devices, memory and disk, as auto "
        "does where one device has no room for the model.",
        group="Running",
    )
    dtype: str = option(
        "auto", "Type the model runs in while it is calibrated and verified.", group="Running", choices=DTYPES
    )
    verify: str = option(
        "full",
        "full: load what was written in a fresh process and compare it with the original. files: check what "
        "needs no model in memory, for models larger than the machine.",
        group="Running",
        choices=("full", "files"),
    )

    def finds_layers(self) -> bool:
        """Is a layer left to be found on the calibration prompts?"""
        return AUTO in (self.safety_layer, self.semantic_layer)

    def regularization_value(self) -> float | None:
        """The number that was given, or None for auto."""
        return None if self.regularization == "auto" else float(self.regularization)

    def check(self) -> None:
        """Raise SasaExportError where settings contradict each other or leave their range."""
        for entry in fields(self):
            value, choices = getattr(self, entry.name), entry.metadata.get("choices")
            if choices and value not in choices:
                flag = "--" + entry.name.replace("_", "-")
                raise SasaExportError(f"{flag} is {value!r}; it must be one of {', '.join(map(str, choices))}.")
        if self.probe is not None and self.calibration:
            raise SasaExportError("--probe and --calibration exclude each other: a given probe is not fitted.")
        for name, layer in (("safety", self.safety_layer), ("semantic", self.semantic_layer)):
            if isinstance(layer, str) and layer != AUTO:
                raise SasaExportError(f"--{name}-layer is {layer!r}; it must be a block's number or {AUTO}.")
        if self.probe is not None and self.finds_layers():
            raise SasaExportError(
                f"--probe and layers left to {AUTO} exclude each other: a probe belongs to the layers it was fitted "
                "on. Give both layers."
            )
        if self.projection == "none" and (self.safety_layer, self.semantic_layer) != (None, None):
            raise SasaExportError(
                "--projection none has no safety and no semantic layer. Leave --safety-layer and --semantic-layer out."
            )
        if self.probe_block is not None and self.projection == "none":
            raise SasaExportError("--projection none has no second lane. Leave --probe-block out.")
        if self.probe_block is not None and self.finds_layers():
            raise SasaExportError(
                f"--probe-block and layers left to {AUTO} exclude each other: pairs are compared at the last block. "
                "Give both layers."
            )
        if self.threshold is not None and not 0.0 < self.threshold < 1.0:
            raise SasaExportError(f"--threshold is {self.threshold:g}; it must lie between 0 and 1.")
        if not 0.0 <= self.max_false_positive_rate < 1.0:
            raise SasaExportError(
                f"--max-false-positive-rate is {self.max_false_positive_rate:g}; it must be at least 0 and below 1."
            )
        if not 0.0 <= self.max_changed_verdicts < 1.0:
            raise SasaExportError(
                f"--max-changed-verdicts is {self.max_changed_verdicts:g}; it must be at least 0 and below 1."
            )
        if self.verdict_prompts < 1:
            raise SasaExportError(f"--verdict-prompts is {self.verdict_prompts}; it must be at least 1.")
        try:
            given = self.regularization_value()
        except ValueError:
            given = -1.0
        if given is not None and not given > 0:
            raise SasaExportError(f"--regularization is {self.regularization}; it must be auto or a number above 0.")
        if not 0.0 < self.epsilon < float("inf"):
            raise SasaExportError(f"--epsilon is {self.epsilon:g}; it must be a number above 0.")
        if self.batch_size < 1:
            raise SasaExportError(f"--batch-size is {self.batch_size}; it must be at least 1.")
        if not self.refusal.strip():
            raise SasaExportError("--refusal is empty; give the sentence that the model should say.")

    def to_json(self) -> dict[str, Any]:
        """Everything that shapes the result; where it is written, and with what load, does not."""
        left_out = ("out", "force", "link", "batch_size", "device")
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in left_out}
        values["calibration"] = list(self.calibration) or None
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
