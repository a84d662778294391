"""Fitted probes in a file. smol-llava ships with probes from training/fit_smol_llava_probe.py and needs no calibration.
A patched directory keeps its probes, so that an evaluation need not fit them again."""

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
from sasa_export.prompts.prompt import Prompt, digest_of

FILE = Path(__file__).with_name("smol_llava_probe.safetensors")


def origin_of(prompts: Sequence[Prompt], settings: LaneSettings) -> str:
    """Return a digest of what a patched directory's probes depend on: the calibration prompts and the second lane."""
    return hashlib.sha256(f"{digest_of(prompts)} {replace(settings, softcap=None)}".encode()).hexdigest()


def made_from(layers: tuple[int, int] | None) -> str:
    """Return a digest of what the bundled probes depend on: vision tower, calibration set and layers."""
    parts = [path.read_bytes() for path in (VISION, *DATA)]
    return hashlib.sha256(b"".join([*parts, repr(layers).encode()])).hexdigest()


def write(fitted: Fitted, origin: str, file: Path = FILE) -> None:
    """Write probes with the scores of their calibration prompts. `origin` is the digest of what they depend on."""
    from safetensors.numpy import save

    arrays = {f"scores.{name}": scores.astype("float32") for name, scores in fitted.scores.items()}
    arrays |= {f"detected.{name}": values.astype("float32") for name, values in fitted.detected.items()}
    arrays |= {"final": fitted.final.astype("float32")}
    said: dict[str, Any] = {"regularization": fitted.regularization, "words": fitted.words, "made_from": origin}
    for kind in ("probes", "detectors"):
        found = getattr(fitted, kind)
        arrays |= {f"{kind}.{name}": weight.astype("float32") for name, (weight, _) in found.items()}
        said[kind] = {name: np.asarray(bias).tolist() for name, (_, bias) in found.items()}
    file.write_bytes(save(arrays, metadata={"sasa": json.dumps(said)}))


def read(model: str, settings: LaneSettings, calibration: Sequence[str] | None, regularization: Any) -> Fitted | None:
    """Return the bundled probe, or None where the model, a setting or the data differs from its fit.

    Args: model: the model's name; calibration and regularization: as in `Options`.
    """
    layers = settings.pair
    usual = layers is not None and replace(settings, softcap=None) == LaneSettings(*layers)
    if model != EMBEDDED or not usual or calibration or regularization != AUTO:
        return None
    return load(FILE, made_from(layers))


def load(file: Path, origin: str) -> Fitted | None:
    """Return the probes that `write` stored for the same `origin`, or None."""
    from safetensors import safe_open

    if not file.exists():
        return None
    with safe_open(file, framework="np") as opened:
        said = json.loads(opened.metadata()["sasa"])
        arrays = {name: opened.get_tensor(name) for name in opened.keys()}
    if said["made_from"] != origin:
        return None
    wide = {name: values.astype("float64") for name, values in arrays.items()}
    probes = {name: (wide[f"probes.{name}"], bias) for name, bias in said["probes"].items()}
    detectors = {name: (wide[f"detectors.{name}"], np.array(bias)) for name, bias in said["detectors"].items()}
    detected = {name: wide[f"detected.{name}"] for name in probes}
    scores = {name: wide[f"scores.{name}"] for name in (*probes, "words") if f"scores.{name}" in wide}
    return Fitted(probes, detectors, detected, said["regularization"], scores, wide["final"], said.get("words"))
