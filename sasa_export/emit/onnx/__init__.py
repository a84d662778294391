"""A guarded directory to ONNX graphs that any runtime loads and that judge each prompt themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sasa_export.errors import EmitError, SasaExportError

OPSETS = (20, 23)
# Types, and how runtimes mark each in the names of the graphs.
SUFFIX = {"float32": "", "float16": "_fp16", "bfloat16": "_bf16", "int8": "_int8", "int4": "_q4"}
DTYPES = tuple(SUFFIX)
VISION, EMBEDDING, DECODER = GRAPHS = ("vision_encoder", "embed_tokens", "decoder_model_merged")

__all__ = ["DECODER", "DTYPES", "EMBEDDING", "GRAPHS", "OPSETS", "SUFFIX", "VISION", "export"]


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
    if dtype not in DTYPES:
        raise EmitError(f"dtype {dtype!r} is not supported. Choose one of: {', '.join(DTYPES)}.")
    from sasa_export.emit.onnx.graphs import write_graphs

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
