"""The probe that smol-llava brings along, made by training/fit_smol_llava_probe.py: no calibration is needed for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sasa_export.graph.rewrite import LaneSettings
from sasa_export.models import EMBEDDED
from sasa_export.models.smol_llava import VISION
from sasa_export.options import AUTO
from sasa_export.prompts.builtin_sets import DATA

if TYPE_CHECKING:
    from sasa_export.probe import Fitted

FILE = Path(__file__).with_name("smol_llava_probe.safetensors")


def made_from(layers: tuple[int, int] | None) -> str:
    """What the probe depends on, as one digest: vision tower, calibration set, and layers."""
    parts = [path.read_bytes() for path in (VISION, *DATA)]
    return hashlib.sha256(b"".join([*parts, repr(layers).encode()])).hexdigest()


def write(fitted: Fitted, layers: tuple[int, int] | None, file: Path = FILE) -> None:
    """Write a probe on the built-in set, with the scores of all of its prompts."""
    from safetensors.numpy import save_file

    arrays = {f"scores.{name}": scores.astype("float32") for name, scores in fitted.scores.items()}
    arrays |= {f"weight.{name}": weight for name, (weight, _) in fitted.probes.items()}
    arrays |= {"final": fitted.final.astype("float32")}
    biases = {name: bias for name, (_, bias) in fitted.probes.items()}
    said = {"biases": biases, "regularization": fitted.regularization, "made_from": made_from(layers)}
    save_file(arrays, file, metadata={"sasa": json.dumps(said)})


def read(model: str, settings: LaneSettings, calibration: Sequence[str] | None, regularization: Any) -> Fitted | None:
    """The carried probe, where all that it was fitted with is as it was; else None.

    Args: model: its name; calibration and regularization: as `Options` have them.
    """
    from safetensors import safe_open

    from sasa_export.probe import Fitted

    layers = settings.pair
    usual = layers is not None and replace(settings, softcap=None) == LaneSettings(*layers)
    if model != EMBEDDED or not usual or calibration or regularization != AUTO or not FILE.exists():
        return None
    with safe_open(FILE, framework="np") as file:
        said = json.loads(file.metadata()["sasa"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}
    if said["made_from"] != made_from(layers):
        return None
    probes = {name: (arrays[f"weight.{name}"], bias) for name, bias in said["biases"].items()}
    scores = {name: arrays[f"scores.{name}"].astype("float64") for name in (*probes, "words")}
    return Fitted(probes, said["regularization"], scores, arrays["final"].astype("float64"))
