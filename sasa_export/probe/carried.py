"""The probe that smol-llava brings along, made by training/fit_smol_llava_probe.py: no calibration is needed for it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from sasa_export.models.smol_llava import VISION
from sasa_export.prompts.builtin_sets import DATA

if TYPE_CHECKING:
    from sasa_export.probe import Fitted

FILE = Path(__file__).with_name("smol_llava_probe.safetensors")


def made_from(layers: tuple[int, int]) -> str:
    """What the probe depends on, as one digest: vision tower, calibration set, and layers."""
    parts = [path.read_bytes() for path in (VISION, *DATA)]
    return hashlib.sha256(b"".join([*parts, repr(layers).encode()])).hexdigest()


def write(fitted: Fitted, layers: tuple[int, int], file: Path = FILE) -> None:
    """Write a probe on the built-in set, with the scores of all of its prompts."""
    from safetensors.numpy import save_file

    arrays = {f"scores.{name}": scores.astype("float32") for name, scores in fitted.scores.items()}
    arrays |= {"weight": fitted.weight, "final": fitted.final.astype("float32")}
    said = {"bias": fitted.bias, "regularization": fitted.regularization, "made_from": made_from(layers)}
    save_file(arrays, file, metadata={"sasa": json.dumps(said)})


def read(layers: tuple[int, int] | None) -> Fitted | None:
    """The carried probe; None where it was made from something else, or there is none."""
    from safetensors import safe_open

    from sasa_export.probe import Fitted

    if layers is None or not FILE.exists():
        return None
    with safe_open(FILE, framework="np") as file:
        said = json.loads(file.metadata()["sasa"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}
    if said["made_from"] != made_from(layers):
        return None
    scores = {name.removeprefix("scores."): values for name, values in arrays.items() if name.startswith("scores.")}
    ordered = {name: scores[name].astype("float64") for name in ("projected", "plain", "words") if name in scores}
    final = arrays["final"].astype("float64")
    return Fitted(arrays["weight"], said["bias"], said["regularization"], ordered, final)
