"""From a guarded directory to an ONNX directory, or an error that says at which step it ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sasa_export.errors import EmitError, SasaExportError
from sasa_export.options import ONNX_DTYPES, OPSETS


def export(
    patched: Path,
    out: Path,
    *,
    opset: int = 23,
    dtype: str = "float32",
    advance: Callable[[str], None] = lambda step: None,
) -> None:
    """Write the ONNX directory of a finished guarded directory.

    Args:
        patched: a guarded safetensors directory.
        out: an empty directory; what an error leaves there is the caller's to remove.
        opset: 23 keeps attention, rotary embedding and RMS norm as single operators; 20 loads in old runtimes.
        dtype: of weights, states and cache; int8 and int4 are of the weights alone, in blocks. The gate's
            arithmetic stays in float32 in all of them, as do the inputs and outputs other than the cache.
        advance: told of each step as it begins.

    Raises EmitError: unknown opset or dtype, a family without a recipe, a model that cannot be turned into graphs.
    """
    if opset not in OPSETS:
        raise EmitError(f"opset {opset} is not supported. Choose one of: {', '.join(map(str, OPSETS))}.")
    if dtype not in ONNX_DTYPES:
        raise EmitError(f"dtype {dtype!r} is not supported. Choose one of: {', '.join(ONNX_DTYPES)}.")
    from sasa_export.writers.onnx.graphs import write_graphs

    at = "beginning"

    def step(name: str) -> None:
        nonlocal at
        at = name
        advance(name)

    try:
        write_graphs(patched, out, opset=opset, dtype=dtype, advance=step)
    except (SasaExportError, OSError):
        raise
    except Exception as error:  # the exporter and its rewriting fail in as many ways as there are operators
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
        raise EmitError(
            f"{at} failed ({type(error).__name__}: {said[:300]}). The model may hold what the exporter cannot turn "
            "into ONNX, or memory ran out. Try another --onnx-dtype or --opset, or give --format safetensors."
        ) from error
