"""ONNX decoders as others export them: onnxruntime-genai's builder, or optimum, each in an environment of its own.

    python make.py builder|optimum OUT [NAME...]

Reads OUT/sources (see sources.py). Writes OUT/EXPORTER/NAME for tiny decoders and OUT/EXPORTER/smol-llava-TYPE for the
real one; OUT/EXPORTER.json says of each name "ok" or why it could not be exported.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# What the builder is told for smol-llava: the type, and whether the decoder has the embedding in it.
BUILT = {
    "float32": ("fp32", True), "float16": ("fp16", True), "int4": ("int4", True),
    "float32-ids": ("fp32", False), "int4-ids": ("int4", False),
}  # fmt: skip
REAL = "smol-llava"


def build(source: Path, out: Path, precision: str, without_embedding: bool) -> None:
    """By onnxruntime-genai's builder."""
    command = [
        sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", out, "-p", precision, "-e", "cpu",
        "-c", out.parent / "cache", "--extra_options", f"exclude_embeds={str(without_embedding).lower()}",
    ]  # fmt: skip
    _run(command, out)


def convert(source: Path, out: Path, task: str = "text-generation-with-past") -> None:
    """By optimum, in float32."""
    command = [sys.executable, "-m", "optimum.exporters.onnx", "-m", source, "--task", task, out]
    _run(command, out)


def convert_to(kind: str, original: Path, out: Path) -> None:
    """What optimum exported, in another type, by onnxruntime's own tools."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.transformers.float16 import convert_float_to_float16

    shutil.copytree(original, out, ignore=shutil.ignore_patterns("model.onnx*"))
    if kind == "int8-dynamic":
        quantize_dynamic(original / "model.onnx", out / "model.onnx", weight_type=QuantType.QInt8)
        return
    model = onnx.load(original / "model.onnx")
    if kind == "int4":
        quantizer = MatMulNBitsQuantizer(model, bits=4, block_size=32, is_symmetric=True, accuracy_level=4)
        quantizer.process()
        model = quantizer.model.model
    else:
        model = convert_float_to_float16(model)
    onnx.save_model(model, out / "model.onnx", save_as_external_data=True, location="model.onnx_data")


def by_builder(root: Path) -> dict[str, Callable[[Path], None]]:
    """A way to write each name that OUT/builder may have."""
    real, llama = root / "sources" / REAL, root / "sources" / "llama"

    def way(source: Path, *options: Any) -> Callable[[Path], None]:
        return lambda out: build(source, out, *options)

    ways = {f"{REAL}-{kind}": way(real, *options) for kind, options in BUILT.items()}
    for source in _tiny(root / "sources"):
        ways[source.name] = way(source, "fp32", (source / "preprocessor_config.json").exists())
    return ways | {"llama-int4": way(llama, "int4", False), "llama-float16": way(llama, "fp16", False)}


def by_optimum(root: Path) -> dict[str, Callable[[Path], None]]:
    """A way to write each name that OUT/optimum may have."""
    sources, made = root / "sources-4", root / "optimum"
    ways: dict[str, Callable[[Path], None]] = {}
    for source in _tiny(sources):
        if not (source / "preprocessor_config.json").exists():
            ways[source.name] = partial(convert, source)
    ways[f"{REAL}-float32"] = partial(convert, sources / REAL)
    for kind in ("int4", "float16", "int8-dynamic"):
        for name, first in ((REAL, f"{REAL}-float32"), ("llama", "llama")):
            ways[f"{name}-{kind}"] = partial(convert_to, kind, made / first)
    return ways


def _tiny(sources: Path) -> list[Path]:
    return sorted(source for source in sources.iterdir() if source.name != REAL)


def _run(command: list, out: Path) -> None:
    result = subprocess.run(
        [str(part) for part in command], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    # Optimum ends with an error where its own comparison with torch is over its limit, and the graph is there.
    if not (out / "model.onnx").exists():
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        raise RuntimeError(lines[-1] if lines else "no message")


def main(exporter: str, root: Path, names: list[str]) -> None:
    ways = {"builder": by_builder, "optimum": by_optimum}[exporter](root)
    record = root / f"{exporter}.json"
    said = json.loads(record.read_text()) if record.exists() else {}
    for name in names or ways:
        out = root / exporter / name
        if (out / "model.onnx").exists():
            said[name] = "ok"
            continue
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            ways[name](out)
            said[name] = "ok"
        except Exception as error:  # of other people's code, of any kind
            said[name] = f"{type(error).__name__}: {error}"[:300]
            shutil.rmtree(out, ignore_errors=True)
        print(name, said[name], flush=True)
        record.write_text(json.dumps(said, indent=2) + "\n")
    record.write_text(json.dumps(said, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
