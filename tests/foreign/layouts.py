"""Directories as models with pictures are published, around decoders that onnxruntime-genai's builder made.

    python layouts.py OUT

Runs where sasa-export is installed, behind sources.py and make.py. OUT/transformers_js/NAME has graphs for
transformers.js, of smol-llava in two types side by side; OUT/genai/smol-llava-TYPE for onnxruntime-genai. Of tiny
models there is no vision graph: they are asked in text.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import AutoModelForImageTextToText, AutoProcessor

from sasa_export.models import EMBEDDED, open_source
from sasa_export.onnx.layout import write_files
from sasa_export.onnx.plain import embedding_graph, vision_graph, write_model
from sasa_export.onnx.recipes import recipe_of

sys.path.insert(0, str(Path(__file__).parent))
from sources import WITH_VISION

SUFFIX = {"float32": "", "int4": "_q4"}


def main(root: Path) -> None:
    web = root / "transformers_js"
    for place in (web, root / "genai"):
        shutil.rmtree(place, ignore_errors=True)
    source = open_source(EMBEDDED)
    model = AutoModelForImageTextToText.from_pretrained(source.directory, dtype=torch.float32).eval()
    smol = web / "smol-llava"
    _begin(source.directory, smol)
    text = model.config.get_text_config()
    write_files(source, smol, AutoProcessor.from_pretrained(source.directory), text, {})
    write_model(vision_graph(model, recipe_of("llava"), opset=20), smol / "onnx" / "vision_encoder.onnx")
    shutil.copy(smol / "onnx" / "vision_encoder.onnx", smol / "onnx" / "vision_encoder_q4.onnx")
    merging = embedding_graph(model, opset=20, dtype="float32", merging=True)
    for kind, suffix in SUFFIX.items():
        onnx.save(embedding(model), smol / "onnx" / f"embed_tokens{suffix}.onnx")
        link_decoder(root / "builder" / f"smol-llava-{kind}", smol, suffix)
        out = root / "genai" / f"smol-llava-{kind}"
        for_genai(root / "builder" / out.name, smol, out)
        write_model(merging, out / "embed_tokens.onnx")
    external = {path.name.removesuffix("_data"): 1 for path in smol.glob("onnx/*_data")}
    config = json.loads((smol / "config.json").read_text())
    config["transformers.js_config"] = {"use_external_data_format": external}
    (smol / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in (name for name in WITH_VISION if (root / "builder" / name).exists()):
        _begin(root / "sources" / name, web / name)
        tiny = AutoModelForImageTextToText.from_pretrained(root / "sources" / name)
        onnx.save(embedding(tiny), web / name / "onnx" / "embed_tokens.onnx")
        link_decoder(root / "builder" / name, web / name, "")


def _begin(source: Path, out: Path) -> None:
    """What stands beside graphs."""
    (out / "onnx").mkdir(parents=True)
    for path in [*source.glob("*.json"), *source.glob("*.jinja")]:
        if not path.name.endswith("index.json"):
            shutil.copy(path, out)


@torch.no_grad()
def embedding(model: Any) -> onnx.ModelProto:
    """input_ids -> inputs_embeds, from a table of what the model's own module makes of each token."""
    module, tokens = model.get_input_embeddings(), ["batch_size", "sequence_length"]
    table = module(torch.arange(module.weight.shape[0])[None])[0].numpy()  # (vocabulary, hidden)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "input_ids"], ["inputs_embeds"])], "embedding",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, tokens)],
        [helper.make_tensor_value_info("inputs_embeds", TensorProto.FLOAT, [*tokens, table.shape[1]])],
        [numpy_helper.from_array(table, "table")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def link_decoder(built: Path, out: Path, suffix: str) -> None:
    """The builder's decoder under another name; its weights are the same file, linked. transformers.js expects numbers
    as sizes of the cache, but for its length."""
    config = json.loads((built / "genai_config.json").read_text())["model"]["decoder"]
    model, name = onnx.load(built / "model.onnx", load_external_data=False), f"decoder_model_merged{suffix}.onnx"
    for entry in (entry for tensor in model.graph.initializer for entry in tensor.external_data):
        if entry.key == "location":
            entry.value = f"{name}_data"
    for value in model.graph.input:
        if value.name.startswith("past_key_values."):
            value.type.tensor_type.shape.dim[3].dim_value = config["head_size"]
    onnx.save_model(model, out / "onnx" / name)
    os.link(built / "model.onnx.data", out / "onnx" / f"{name}_data")


def for_genai(built: Path, web: Path, out: Path) -> None:
    """The decoder as the builder left it, and the vision graph that a type of genai's with pictures asks for; the
    embedding's, which takes in the features of pictures, is written behind."""
    shutil.copytree(built, out, copy_function=os.link)
    shutil.copy(web / "onnx" / "vision_encoder.onnx", out)
    for name in ("config.json", "processor_config.json", "preprocessor_config.json"):
        shutil.copy(web / name, out)
    config = json.loads((built / "genai_config.json").read_text())
    config["model"] |= {
        "type": "gemma3",
        "vision": {
            "filename": "vision_encoder.onnx", "inputs": {"pixel_values": "pixel_values"},
            "outputs": {"image_features": "image_features"},
        },
        "embedding": {
            "filename": "embed_tokens.onnx",
            "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
            "outputs": {"inputs_embeds": "inputs_embeds"},
        },
    }  # fmt: skip
    (out / "genai_config.json").unlink()  # it is a link
    (out / "genai_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
