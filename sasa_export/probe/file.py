"""A probe that the user supplies instead of a calibration."""

from pathlib import Path

import numpy as np

from sasa_export.errors import CalibrationError, reworded
from sasa_export.graph import LayerGraph
from sasa_export.models.load import Sizes
from sasa_export.probe.fit import Probe

PROBE_WEIGHT, PROBE_BIAS = "sasa.probe.weight", "sasa.probe.bias"


def read_probe(path: Path, threshold: float | None) -> Probe:
    """Return the probe in a safetensors file with `sasa.probe.weight` (features,) and `sasa.probe.bias` ()."""
    from safetensors import safe_open

    if not path.exists():
        raise CalibrationError(f"there is no probe file {path}. Check --probe.")
    damaged = f"the probe file {path} is not valid safetensors ({{reason}})."
    with reworded(CalibrationError, damaged), safe_open(path, framework="pt") as file:
        for name in (PROBE_WEIGHT, PROBE_BIAS):
            if name not in file.keys():
                raise CalibrationError(f"the probe file {path} has no tensor {name}. Check --probe.")
        weight, bias = (file.get_tensor(name).float().numpy() for name in (PROBE_WEIGHT, PROBE_BIAS))
    if weight.ndim != 1 or bias.size != 1:
        raise CalibrationError(
            f"the probe in {path} has shapes {weight.shape} and {bias.shape}, not (features,) and ()."
        )
    if not (np.isfinite(weight).all() and np.isfinite(bias).all() and weight.any()):
        raise CalibrationError(f"the probe in {path} is zero, NaN or infinite, so it cannot judge.")
    return Probe(weight, float(bias.item()), 0.5 if threshold is None else threshold)


def check_probe(probe: Probe | None, graph: LayerGraph, sizes: Sizes) -> None:
    """Raise CalibrationError where the user's probe does not fit the rewritten `graph`."""
    end = sizes.vocabulary if graph.of("lane_head") else sizes.hidden
    whole = end + len(graph.of("state_norm")) * sizes.hidden
    if probe is not None and probe.weight.shape != (whole,):
        raise CalibrationError(
            f"the probe has {probe.weight.shape[0]} weights and the model needs {whole}. It was made for another model."
        )
