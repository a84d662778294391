"""ONNX decoders as others export them: onnxruntime-genai's builder, or optimum, each in an environment of its own.

    python make.py builder|optimum OUT

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

REAL = "smol-llava"


def build(source: Path, precision: str, out: Path) -> None:
    """By onnxruntime-genai's builder; of a model with vision, without its embedding."""
    apart = source.name == REAL or (source / "preprocessor_config.json").exists()
    command = [
        sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", out, "-p", precision, "-e", "cpu",
        "-c", out.parent / "cache", "--extra_options", f"exclude_embeds={str(apart).lower()}",
    ]  # fmt: skip
    _run(command, out)


def convert(source: Path, out: Path) -> None:
    """By optimum, in float32."""
    command = [sys.executable, "-m", "optimum.exporters.onnx", "-m", source, "--task", "text-generation-with-past", out]
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
    ways: dict[str, Callable[[Path], None]] = {
        source.name: partial(build, source, "fp32") for source in _tiny(root / "sources")
    }
    ways |= {f"{REAL}-float32": partial(build, real, "fp32"), f"{REAL}-int4": partial(build, real, "int4")}
    return ways | {"llama-int4": partial(build, llama, "int4"), "llama-float16": partial(build, llama, "fp16")}


def by_optimum(root: Path) -> dict[str, Callable[[Path], None]]:
    """A way to write each name that OUT/optimum may have."""
    sources, made = root / "sources-4", root / "optimum"
    texts = [source for source in _tiny(sources) if not (source / "preprocessor_config.json").exists()]
    ways: dict[str, Callable[[Path], None]] = {source.name: partial(convert, source) for source in texts}
    ways[f"{REAL}-float32"] = partial(convert, sources / REAL)
    for kind in ("int4", "float16"):
        ways[f"{REAL}-{kind}"] = partial(convert_to, kind, made / f"{REAL}-float32")
        ways[f"llama-{kind}"] = partial(convert_to, kind, made / "llama")
    return ways | {"llama-int8-dynamic": partial(convert_to, "int8-dynamic", made / "llama")}


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


def main(exporter: str, root: Path) -> None:
    said = {}
    for name, way in {"builder": by_builder, "optimum": by_optimum}[exporter](root).items():
        out = root / exporter / name
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            way(out)
            said[name] = "ok"
        except Exception as error:  # of other people's code, of any kind
            said[name] = f"{type(error).__name__}: {error}"[:300]
            shutil.rmtree(out, ignore_errors=True)
        print(name, said[name], flush=True)
    (root / f"{exporter}.json").write_text(json.dumps(said, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
