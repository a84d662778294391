"""Estimates the memory and disk space of an ONNX export before any work."""

from math import prod

from sasa_export.errors import EmitError
from sasa_export.models import Source
from sasa_export.models.load import available_memory
from sasa_export.options import Options

# Bits of a weight in memory during the export, by type of the graphs. The quantizer starts from float32.
LOADED = {"float32": 32, "float16": 16, "int8": 32, "int4": 32}
# Bits of a matrix product's weight in the file, where each block has one scale of 32 bits.
STORED = {"float32": 32, "float16": 16, "int8": 9, "int4": 5}
TABLE = STORED | {"int4": 9}  # of the embedding table
# Memory of the process, measured by benchmarks/export_memory.py (docs/results/onnx-memory.md) and rounded up. Weights
# that keep the source's type are mapped from its file, and take none.
PROGRAM = 1_300_000_000  # bytes: Python, torch, the exporter, and its copies of one weight at a time
PER_WEIGHT = 1.1  # times the weights, where their type changes
# The quantizer's memory, measured on bare matrix products: 1.2 (int4) and 1.4 (int8) times the float32 weights,
# including these, and 8 times the largest weight, which it copies.
QUANTIZED, COPIES = 1.5, 9
# Times the graphs' bytes, while onnxruntime loads them. Measured on smol-llava in float32: 1.4, then 1.1 when it runs.
RUN = 1.5
DTYPES = {"F32": "float32", "F16": "float16"}  # the names in safetensors
MATRIX = 2  # axes


def needed_bytes(source: Source, dtype: str) -> int:
    """Return the largest possible size on disk, in bytes: all weights in their new type, and the embedding twice."""
    sizes = [(prod(shape), len(shape)) for shard in source.shards for shape in shard.shapes]
    largest = max(count for count, _ in sizes)
    bits = sum(count * (STORED[dtype] if axes == MATRIX else LOADED[dtype]) for count, axes in sizes)
    return (bits + largest * TABLE[dtype]) // 8


def needed_memory(source: Source, dtype: str, *, run: bool) -> int:
    """Return the bytes of memory for making the graphs and, with `run`, for verifying them in onnxruntime."""
    counts = [prod(shape) for shard in source.shards for shape in shard.shapes]
    loaded, largest = (count * LOADED[dtype] // 8 for count in (sum(counts), max(counts)))  # bytes
    if dtype in ("int8", "int4"):
        made = loaded * QUANTIZED + largest * COPIES
    else:
        stored = {DTYPES.get(name, name) for shard in source.shards for name in shard.types}
        made = 0.0 if stored == {dtype} else loaded * PER_WEIGHT
    return PROGRAM + int(max(made, needed_bytes(source, dtype) * RUN if run else 0.0))


def check_memory(source: Source, options: Options) -> None:
    """Raise EmitError where the graphs need more memory than the machine has available."""
    dtype, run = options.onnx_dtype, options.verify == "full"
    needed, available = needed_memory(source, dtype, run=run), available_memory()
    if available < needed:
        raise EmitError(
            f"{available / 1e9:.1f} GB of memory are available and {dtype} graphs of {source.name} need about "
            f"{needed / 1e9:.1f} GB. Free some memory, use a larger machine, or try --verify files or another "
            "--onnx-dtype."
        )
