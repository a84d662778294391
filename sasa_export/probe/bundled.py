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

    models: dict[str, Any] = {"probes": fitted.probes, "detectors": fitted.detectors}
    kinds: dict[str, Any] = {kind: {name: weight for name, (weight, _) in of.items()} for kind, of in models.items()}
    kinds |= {"scores": fitted.scores, "detected": fitted.detected}
    arrays = {f"{kind}.{name}": values.astype("float32") for kind, of in kinds.items() for name, values in of.items()}
    arrays["final"] = fitted.final.astype("float32")
    texts: dict[str, Any] = {"regularization": fitted.regularization, "words": fitted.words, "made_from": origin}
    texts |= {kind: {name: np.asarray(bias).tolist() for name, (_, bias) in of.items()} for kind, of in models.items()}
    file.write_bytes(save(arrays, metadata={"sasa": json.dumps(texts)}))


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
        texts = json.loads(opened.metadata()["sasa"])
        arrays = {name: opened.get_tensor(name).astype("float64") for name in opened.keys()}
    if texts["made_from"] != origin:
        return None
    probes = {name: (arrays[f"probes.{name}"], bias) for name, bias in texts["probes"].items()}
    detectors = {name: (arrays[f"detectors.{name}"], np.array(bias)) for name, bias in texts["detectors"].items()}
    detected = {name: arrays[f"detected.{name}"] for name in probes}
    scores = {name.removeprefix("scores."): values for name, values in arrays.items() if name.startswith("scores.")}
    return Fitted(probes, detectors, detected, texts["regularization"], scores, arrays["final"], texts.get("words"))
