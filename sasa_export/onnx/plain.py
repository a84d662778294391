"""Exports a torch model as plain graphs, without a gate: vision encoder, embedding and decoder."""

from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from sasa_export.models import Source
from sasa_export.models.family import OnnxRecipe, family_of
from sasa_export.onnx import MERGING, NAMES, SUFFIX
from sasa_export.onnx.convert import convert
from sasa_export.onnx.flat import FlatDecoder, Shape, Signature, feature_width
from sasa_export.onnx.genai import write_genai_config
from sasa_export.onnx.layout import write_files
from sasa_export.onnx.quantize import BITS, quantize, round_table
from sasa_export.onnx.recipes import recipe_of, tower_class
from sasa_export.onnx.towers.llava import Embedding, Float32
from sasa_export.report import Silent

# A graph with more bytes of weights keeps them in a file beside it. One protobuf holds at most 2 GB, and is built in
# memory as a whole.
EXTERNAL_ABOVE = 256 * 2**20
SMALL = 1024  # bytes; smaller weights stay in the graph


def write_plain(
    model: Any, processor: Any, source: Source, out: Path, *, opset: int, dtype: str, report: Silent
) -> dict[str, str]:
    """Write the graphs of a stock model, and its configuration and processor as runtimes expect them. Return the
    graphs' files by role.

    Args:
        out: the directory, which already holds the files that are copied from the source.
        opset: 23 keeps attention, rotary embedding and RMS norm as single operators; 20 loads in old runtimes.
        dtype: the type of weights, states and cache. int8 and int4 apply only to weights, in blocks. Inputs and
            outputs, except the cache, are always float32.
    """
    recipe, decoder = recipe_of(model.config.model_type), FlatDecoder(model)
    (out / "onnx").mkdir()
    files = {role: f"onnx/{name}{SUFFIX[dtype]}.onnx" for role, name in NAMES.items()}
    report.step("onnx", "exporting the vision encoder")
    write_model(vision_graph(model, recipe, opset=opset, dtype=dtype), out / files["vision"])
    report.step("onnx", "exporting the embedding")
    # genai_config.json describes only positions with one axis, and a cache of keys and values.
    genai = recipe.position_axes == 1 and not decoder.convolved
    write_embeddings(model, out / "onnx", opset=opset, dtype=dtype, merging=genai)
    report.step("onnx", "exporting the decoder")
    write_model(decoder_graph(model, recipe, opset=opset, dtype=dtype), out / files["decoder"])
    external = {NAMES[role]: 1 for role, file in files.items() if (out / f"{file}_data").exists()}
    write_files(source, out, processor, model.config.get_text_config(decoder=True), external)
    if genai:
        write_genai_config(out, decoder, {**files, "embedding": f"onnx/{MERGING}{SUFFIX[dtype]}.onnx"})
    return files


def vision_graph(model: Any, recipe: OnnxRecipe, *, opset: int, dtype: str = "float32") -> ir.Model:
    kind = tower_class(recipe)
    inputs, arguments = kind.inputs(model)
    inputs = {recipe.renamed_inputs.get(name, name): shape for name, shape in inputs.items()}
    signature = Signature(inputs, {"image_features": ("num_image_tokens", feature_width(model))})
    tower = Float32(kind(model), model.dtype, flat=True)
    graph = convert(tower, (list(arguments),), signature, {"": "/vision", "inner": "/vision"}, opset=opset)
    quantize(graph, dtype)
    for name in recipe.optional_inputs:
        _make_optional(graph, name)
    return graph


def write_embeddings(model: Any, folder: Path, *, opset: int, dtype: str, merging: bool) -> None:
    """Write the embedding's graph and, with `merging`, a second one that also inserts a picture's features. Both share
    one file of weights."""
    path = folder / f"{NAMES['embedding']}{SUFFIX[dtype]}.onnx"
    write_model(embedding_graph(model, opset=opset, dtype=dtype), path, always_outside=merging)
    if merging:
        graph = embedding_graph(model, opset=opset, dtype=dtype, merging=True)
        stored = ir.load(path).graph.initializers
        for name, value in graph.graph.initializers.items():
            there = stored[name].const_value if name in stored else None
            if isinstance(there, ir.ExternalTensor) and (there.dtype, there.shape) == (value.dtype, value.shape):
                value.const_value = there
        ir.save(graph, folder / f"{MERGING}{SUFFIX[dtype]}.onnx")


def embedding_graph(model: Any, *, opset: int, dtype: str, merging: bool = False) -> ir.Model:
    width = feature_width(model)
    tokens = ("batch_size", "sequence_length")
    inputs: dict[str, Shape] = {"input_ids": tokens}
    if merging:
        inputs["image_features"] = ("num_image_tokens", width)
    signature = Signature(inputs, {"inputs_embeds": (*tokens, width)})
    example = list(signature.example({"image_features": torch.float32}).values())
    names = {"": "/embedding", "inner": "/embedding"}
    graph = convert(Float32(Embedding(model), model.dtype), (example,), signature, names, opset=opset)
    if dtype in BITS:
        round_table(graph)
    return graph


def decoder_graph(model: Any, recipe: OnnxRecipe, *, opset: int, dtype: str = "float32") -> ir.Model:
    decoder = FlatDecoder(model).eval()
    signature = decoder.signature(recipe.position_axes, recipe.decoder_inputs)
    modules = family_of(model.config.model_type).modules
    named = (("blocks", "layers"), ("norm", "norm"), ("head", "lm_head"))
    names = {"": "/decoder", **{f"model.{modules[role]}": f"/decoder/{name}" for role, name in named}}
    graph = convert(decoder, decoder.example(signature), signature, names, opset=opset)
    quantize(graph, dtype)
    for name in recipe.decoder_inputs:
        _make_optional(graph, name)
    return graph


def _make_optional(model: ir.Model, name: str) -> None:
    """Give an input a default of one zero, (1, 1). ONNX calls this an overridable initializer."""
    value = next(value for value in model.graph.inputs if value.name == name)
    value.shape = ir.Shape([None, None])
    value.const_value = ir.tensor([[0]], dtype=ir.DataType.INT64, name=name)
    model.graph.register_initializer(value)


def write_model(model: ir.Model, path: Path, *, always_outside: bool = False) -> None:
    """Write one graph. Large weights go into a file beside it."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    outside = size > EXTERNAL_ABOVE or always_outside
    ir.save(model, path, external_data=f"{path.name}_data" if outside else None, size_threshold_bytes=SMALL)
