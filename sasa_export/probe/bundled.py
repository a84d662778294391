"""The probe that smol-llava ships with, made by training/fit_smol_llava_probe.py: no calibration is needed for it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sasa_export.graph.rewrite import LaneSettings
from sasa_export.models import EMBEDDED
from sasa_export.models.smol_llava import VISION
from sasa_export.options import AUTO
from sasa_export.probe.calibration import Fitted
from sasa_export.prompts.builtin_sets import DATA

FILE = Path(__file__).with_name("smol_llava_probe.safetensors")


def made_from(layers: tuple[int, int] | None) -> str:
    """What the probe depends on, as one digest: vision tower, calibration set, and layers."""
    parts = [path.read_bytes() for path in (VISION, *DATA)]
    return hashlib.sha256(b"".join([*parts, repr(layers).encode()])).hexdigest()


def write(fitted: Fitted, layers: tuple[int, int] | None, file: Path = FILE) -> None:
    """Write a probe on the built-in set, with the scores of all of its prompts."""
    from safetensors.numpy import save_file

    arrays = {f"scores.{name}": scores.astype("float32") for name, scores in fitted.scores.items()}
    arrays |= {f"detected.{name}": values.astype("float32") for name, values in fitted.detected.items()}
    arrays |= {"final": fitted.final.astype("float32")}
    said: dict[str, Any] = {"regularization": fitted.regularization, "made_from": made_from(layers)}
    for kind in ("probes", "detectors"):
        found = getattr(fitted, kind)
        arrays |= {f"{kind}.{name}": weight.astype("float32") for name, (weight, _) in found.items()}
        said[kind] = {name: np.asarray(bias).tolist() for name, (_, bias) in found.items()}
    save_file(arrays, file, metadata={"sasa": json.dumps(said)})


def read(model: str, settings: LaneSettings, calibration: Sequence[str] | None, regularization: Any) -> Fitted | None:
    """The bundled probe, where all that it was fitted with is as it was; else None.

    Args: model: its name; calibration and regularization: as `Options` have them.
    """
    from safetensors import safe_open

    layers = settings.pair
    usual = layers is not None and replace(settings, softcap=None) == LaneSettings(*layers)
    if model != EMBEDDED or not usual or calibration or regularization != AUTO or not FILE.exists():
        return None
    with safe_open(FILE, framework="np") as file:
        said = json.loads(file.metadata()["sasa"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}
    if said["made_from"] != made_from(layers):
        return None
    wide = {name: values.astype("float64") for name, values in arrays.items()}
    probes = {name: (wide[f"probes.{name}"], bias) for name, bias in said["probes"].items()}
    detectors = {name: (wide[f"detectors.{name}"], np.array(bias)) for name, bias in said["detectors"].items()}
    detected = {name: wide[f"detected.{name}"] for name in probes}
    scores = {name: wide[f"scores.{name}"] for name in (*probes, "words")}
    return Fitted(probes, detectors, detected, said["regularization"], scores, wide["final"])
