"""Directories as models with pictures are published, around decoders that onnxruntime-genai's builder made.

    python layouts.py OUT

Runs where sasa-export is installed, behind sources.py and make.py. OUT/transformers_js/NAME has graphs for
transformers.js, of smol-llava in several types side by side; OUT/genai/smol-llava-TYPE for onnxruntime-genai. Of tiny
models there is no vision graph: they are asked in text.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer, QuantFormat
from transformers import AutoModelForImageTextToText, AutoProcessor

from sasa_export.models import EMBEDDED, open_source

sys.path.insert(0, str(Path(__file__).parent))
from sources import WITH_VISION

SUFFIX = {"float32": "", "float16": "_fp16", "int4": "_q4"}
KEPT = ("*.json", "*.jinja")


def main(root: Path) -> None:
    parts = root / "parts"
    if not (parts / "vision_encoder.onnx").exists():
        write_parts(parts)
    for_transformers_js(root, parts)
    for kind in SUFFIX:
        for_genai(root, parts, kind)
    for name in WITH_VISION:
        if (root / "builder" / name).exists():
            for_transformers_js_without_pictures(root, name)


def write_parts(parts: Path) -> None:
    """smol-llava's embedding and vision in each type, and what stands beside graphs."""
    parts.mkdir(parents=True, exist_ok=True)
    source = open_source(EMBEDDED).directory
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    table = table_of(model)
    picture = int(model.config.image_token_id)
    for kind, dtype in (("float32", np.float32), ("float16", np.float16)):
        save(embedding(table.astype(dtype)), parts / f"embed_tokens{SUFFIX[kind]}.onnx")
        save(merging(table.astype(dtype), picture), parts / f"merging{SUFFIX[kind]}.onnx")
    quantizer = MatMulNBitsQuantizer(
        onnx.load(parts / "embed_tokens.onnx"), bits=4, block_size=32, is_symmetric=True,
        quant_format=QuantFormat.QOperator, op_types_to_quantize=("Gather",),
    )  # fmt: skip
    quantizer.process()
    save(quantizer.model.model, parts / "embed_tokens_q4.onnx")
    pixels = torch.zeros(1, 3, model.config.vision_config.image_size, model.config.vision_config.image_size)
    torch.onnx.export(
        Vision(model), (pixels,), parts / "vision_encoder.onnx", dynamo=False, opset_version=17,
        input_names=["pixel_values"], output_names=["image_features"],
        dynamic_axes={"pixel_values": {0: "batch_size"}, "image_features": {0: "batch_size"}},
    )  # fmt: skip
    processor = AutoProcessor.from_pretrained(source)
    processor.save_pretrained(parts)
    described = {**processor.image_processor.to_dict(), "processor_class": type(processor).__name__}
    (parts / "preprocessor_config.json").write_text(json.dumps(described, indent=2, default=list) + "\n")
    for path in (path for pattern in KEPT for path in source.glob(pattern)):
        if not path.name.endswith("index.json"):
            shutil.copy(path, parts)


class Vision(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        states = self.model.model.vision_tower(pixel_values).last_hidden_state[:, 1:]  # (pictures, tokens, vision)
        return self.model.model.multi_modal_projector(states)  # (pictures, tokens, hidden)


@torch.no_grad()
def table_of(model: Any) -> Any:
    """What the embedding makes of each token, (vocabulary, hidden)."""
    module = model.get_input_embeddings()
    return module(torch.arange(module.weight.shape[0])[None])[0].numpy()


def embedding(table: Any) -> onnx.ModelProto:
    """input_ids -> inputs_embeds."""
    return _graph([helper.make_node("Gather", ["table", "input_ids"], ["inputs_embeds"])], table, [])


def merging(table: Any, picture: int) -> onnx.ModelProto:
    """input_ids, image_features -> inputs_embeds, the features in the places of the picture's token, in order."""
    hidden, kind = table.shape[1], helper.np_dtype_to_tensor_dtype(table.dtype)
    constants = {
        "picture": np.array(picture), "none": np.zeros((1, hidden), table.dtype), "flat": np.array([-1]),
        "wide": np.array([-1, hidden]), "zero": np.array(0), "last": np.array([-1]),
    }  # fmt: skip
    steps = [
        ("Gather", ["table", "input_ids"], "words"), ("Equal", ["input_ids", "picture"], "places"),
        ("Reshape", ["places", "flat"], "flags"), ("Cast", ["flags"], "counted"),
        ("CumSum", ["counted", "zero"], "rank"), ("Mul", ["rank", "counted"], "which"),
        ("Reshape", ["image_features", "wide"], "rows"),
        ("Concat", ["none", "rows"], "all"), ("Gather", ["all", "which"], "taken"), ("Shape", ["words"], "shape"),
        ("Reshape", ["taken", "shape"], "there"), ("Unsqueeze", ["places", "last"], "where"),
        ("Where", ["where", "there", "words"], "inputs_embeds"),
    ]  # fmt: skip
    options: dict[str, dict[str, Any]] = {"Cast": {"to": TensorProto.INT64}, "Concat": {"axis": 0}}
    nodes = [helper.make_node(op, given, [out], **options.get(op, {})) for op, given, out in steps]
    features = helper.make_tensor_value_info("image_features", kind, ["pictures", "image_tokens", hidden])
    model = _graph(nodes, table, [features])
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    return model


def _graph(nodes: list[Any], table: Any, more: list[Any]) -> onnx.ModelProto:
    kind, tokens = helper.np_dtype_to_tensor_dtype(table.dtype), ["batch_size", "sequence_length"]
    graph = helper.make_graph(
        nodes, "embedding", [helper.make_tensor_value_info("input_ids", TensorProto.INT64, tokens), *more],
        [helper.make_tensor_value_info("inputs_embeds", kind, [*tokens, table.shape[1]])],
        [numpy_helper.from_array(table, "table")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def save(model: onnx.ModelProto, path: Path, data: str | None = None) -> None:
    onnx.save_model(
        model, path, save_as_external_data=True, location=data or f"{path.name}_data", size_threshold=1 << 20
    )


def link_decoder(built: Path, out: Path) -> None:
    """The builder's decoder under another name; its weights are the same file, linked."""
    model = onnx.load(built / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = f"{out.name}_data"
    out.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(model, out)
    _link(built / "model.onnx.data", out.parent / f"{out.name}_data")


def for_transformers_js(root: Path, parts: Path) -> None:
    out = root / "transformers_js" / "smol-llava"
    shutil.rmtree(out, ignore_errors=True)
    (out / "onnx").mkdir(parents=True)
    for path in parts.iterdir():
        if path.name.startswith(("embed_tokens", "vision_encoder")):
            _link(path, out / "onnx" / path.name)
        elif path.suffix in (".json", ".jinja"):
            shutil.copy(path, out)
    for kind, suffix in SUFFIX.items():
        link_decoder(root / "builder" / f"smol-llava-{kind}", out / "onnx" / f"decoder_model_merged{suffix}.onnx")
    external = {path.name.removesuffix("_data"): 1 for path in out.glob("onnx/*_data")}
    config = json.loads((out / "config.json").read_text())
    config["transformers.js_config"] = {"use_external_data_format": external}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def for_genai(root: Path, parts: Path, kind: str) -> None:
    """The decoder as the builder left it, and the two graphs that a type of genai's with pictures asks for."""
    built, out = root / "builder" / f"smol-llava-{kind}", root / "genai" / f"smol-llava-{kind}"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for path in built.iterdir():
        _link(path, out / path.name)
    suffix = SUFFIX["float16" if kind == "float16" else "float32"]
    for name in (f"merging{suffix}.onnx", f"merging{suffix}.onnx_data", "vision_encoder.onnx"):
        _link(parts / name, out / name)
    for name in ("config.json", "processor_config.json", "preprocessor_config.json"):
        shutil.copy(parts / name, out)
    config = json.loads((built / "genai_config.json").read_text())
    config["model"] |= {
        "type": "gemma3",
        "vision": {
            "filename": "vision_encoder.onnx", "inputs": {"pixel_values": "pixel_values"},
            "outputs": {"image_features": "image_features"},
        },
        "embedding": {
            "filename": f"merging{suffix}.onnx",
            "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
            "outputs": {"inputs_embeds": "inputs_embeds"},
        },
    }  # fmt: skip
    (out / "genai_config.json").unlink()  # it is a link
    (out / "genai_config.json").write_text(json.dumps(config, indent=2) + "\n")


def for_transformers_js_without_pictures(root: Path, name: str) -> None:
    source, out = root / "sources" / name, root / "transformers_js" / name
    shutil.rmtree(out, ignore_errors=True)
    (out / "onnx").mkdir(parents=True)
    for path in (path for pattern in KEPT for path in source.glob(pattern)):
        shutil.copy(path, out)
    save(embedding(table_of(AutoModelForImageTextToText.from_pretrained(source))), out / "onnx" / "embed_tokens.onnx")
    link_decoder(root / "builder" / name, out / "onnx" / "decoder_model_merged.onnx")


def _link(path: Path, to: Path) -> None:
    os.link(path, to)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
