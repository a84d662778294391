"""Whether memory and disk suffice for an ONNX export, said before any work is done."""

from math import prod

from sasa_export.errors import EmitError
from sasa_export.models import Source
from sasa_export.models.load import available_memory
from sasa_export.options import Options

# Bits of a weight in memory while the graphs are made, by type of the graphs; the quantizer starts from float32.
LOADED = {"float32": 32, "float16": 16, "int8": 32, "int4": 32}
# Bits of a weight of a matrix product in the file; a block has one scale of 32 bits.
STORED = {"float32": 32, "float16": 16, "int8": 9, "int4": 5}
TABLE = STORED | {"int4": 9}  # of the table of embeddings
# Of own memory, measured by benchmarks/export_memory.py (docs/onnx-memory.md), rounded up. What has the type of the
# source stays in its file and is mapped, so that it takes none.
PROGRAM = 1_300_000_000  # bytes: Python, torch, the exporter, and what it holds of one weight at a time
PER_WEIGHT = 1.1  # times the weights, where their type changes
# The quantizer, measured on bare matrix products: 1.2 (int4) and 1.4 (int8) times the float32 weights, them included,
# and 8 times the largest of them, of which it makes copies.
QUANTIZED, COPIES = 1.5, 9
# Times the graphs' bytes while onnxruntime loads them: 1.4 was measured on smol-llava in float32, 1.1 once it runs.
RUN = 1.5
DTYPES = {"F32": "float32", "F16": "float16"}  # the names in safetensors
MATRIX = 2  # axes


def needed_bytes(source: Source, dtype: str) -> int:
    """At most so much disk: every weight in its new type, and the largest, the embedding, once more as a table."""
    sizes = [(prod(shape), len(shape)) for shard in source.shards for shape in shard.shapes]
    largest = max(count for count, _ in sizes)
    bits = sum(count * (STORED[dtype] if axes == MATRIX else LOADED[dtype]) for count, axes in sizes)
    return (bits + largest * TABLE[dtype]) // 8


def needed_memory(source: Source, dtype: str, *, run: bool) -> int:
    """Bytes of memory that the graphs of a type take to make and, with `run`, to verify in onnxruntime."""
    counts = [prod(shape) for shard in source.shards for shape in shard.shapes]
    loaded, largest = (count * LOADED[dtype] // 8 for count in (sum(counts), max(counts)))  # bytes
    if dtype in ("int8", "int4"):
        made = loaded * QUANTIZED + largest * COPIES
    else:
        stored = {DTYPES.get(name, name) for shard in source.shards for name in shard.types}
        made = 0.0 if stored == {dtype} else loaded * PER_WEIGHT
    return PROGRAM + int(max(made, needed_bytes(source, dtype) * RUN if run else 0.0))


def check_memory(source: Source, options: Options) -> None:
    """Raise EmitError where the machine has less memory available than the graphs take."""
    dtype, run = options.onnx_dtype, options.verify == "full"
    needed, available = needed_memory(source, dtype, run=run), available_memory()
    if available < needed:
        raise EmitError(
            f"{available / 1e9:.1f} GB of memory are available and {dtype} graphs of {source.name} need about "
            f"{needed / 1e9:.1f} GB. Free some memory, use a larger machine, or try --verify files or another "
            "--onnx-dtype."
        )
