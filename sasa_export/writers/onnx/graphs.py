"""The three graphs of an ONNX directory, vision encoder, embedding and decoder, and what lies beside them."""

import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from transformers import AutoModelForImageTextToText, AutoProcessor

from sasa_export.errors import EmitError, reworded
from sasa_export.models.family import family_of
from sasa_export.writers.cases import FOLDER
from sasa_export.writers.directory import LICENCES, SCORES
from sasa_export.writers.onnx import DECODER, EMBEDDING, GRAPHS, MERGING, SUFFIX, VISION
from sasa_export.writers.onnx.convert import convert
from sasa_export.writers.onnx.decoder import Decoder, Shape, Signature, feature_width
from sasa_export.writers.onnx.genai import write_genai_config
from sasa_export.writers.onnx.guard import Witness, first_token
from sasa_export.writers.onnx.layout import stock_type, write_files
from sasa_export.writers.onnx.passes.branch import run_where
from sasa_export.writers.onnx.passes.names import name_decoder, name_tower
from sasa_export.writers.onnx.passes.weights import deduplicate
from sasa_export.writers.onnx.quantize import BITS, Table, halve_kernels, quantize
from sasa_export.writers.onnx.recipes import Recipe, recipe_of
from sasa_export.writers.onnx.vision import Embedding, Features, Float32

# A graph with more bytes of weights keeps them in a file beside it: one protobuf holds 2 GB at most, and is
# built in memory as a whole.
EXTERNAL_ABOVE = 256 * 2**20
SMALL = 1024  # bytes of a weight that stays in the graph


@reworded(
    EmitError,
    "the graphs could not be made ({reason}). The model may hold what the exporter cannot turn into ONNX, or memory "
    "ran out. Try another --onnx-dtype or --opset, or give --format safetensors.",
)
def write_onnx_directory(patched: Path, out: Path, *, opset: int, dtype: str, advance: Callable[[str], None]) -> None:
    """Write everything but the card and the manifest, which tell what was verified, into the directory `out`.

    Args:
        patched: a guarded directory for transformers.
        opset: 23 keeps attention, rotary embedding and RMS norm as single operators; 20 loads in old runtimes.
        dtype: of weights, states and cache; int8 and int4 are of the weights alone, in blocks. The gate's
            arithmetic stays in float32 in all of them, as do the inputs and outputs other than the cache.
        advance: told of each step as it begins.

    Raises EmitError. The exporter and its rewriting fail in as many ways as there are operators.
    """
    advance("loading the guarded model")
    kind = torch.float32 if dtype in BITS else getattr(torch, dtype)
    model = AutoModelForImageTextToText.from_pretrained(
        patched, dtype=kind, trust_remote_code=True, attn_implementation="sdpa"
    ).eval()
    recipe = recipe_of(stock_type(model.config.model_type))
    (out / "onnx").mkdir()
    files = {name: out / "onnx" / f"{name}{SUFFIX[dtype]}.onnx" for name in GRAPHS}
    advance("exporting the vision encoder")
    write_model(vision_graph(model, recipe, opset=opset, dtype=dtype), files[VISION])
    advance("exporting the embedding")
    # What onnxruntime-genai is told of: positions of one axis, and a cache of keys and values alone.
    decoder = Decoder(model)
    genai = recipe.position_axes == 1 and not decoder.convolved
    write_embeddings(model, out / "onnx", opset=opset, dtype=dtype, merging=genai)
    advance("exporting the decoder")
    processor = AutoProcessor.from_pretrained(patched, trust_remote_code=True)
    if dtype not in BITS:  # the products of those are rounded already, by more than a change of theirs would tell
        model.sasa.witness = Witness(model, first_token(processor))
    write_model(decoder_graph(model, recipe, opset=opset, dtype=dtype), files[DECODER])
    advance("writing configuration and processor")
    external = {name: 1 for name, path in files.items() if path.with_name(f"{path.name}_data").exists()}
    write_files(patched, out, processor, dtype=dtype, external=external, kinds=decoder.kinds, gate=decoder.gate)
    if genai:
        write_genai_config(out, decoder, dtype=dtype)
    for pattern in (SCORES, *LICENCES):
        for path in sorted(patched.glob(pattern)):
            shutil.copyfile(path, out / path.name)
    if (patched / FOLDER).is_dir():
        shutil.copytree(patched / FOLDER, out / FOLDER)
    _forget(model)


def _forget(model: Any) -> None:
    """Let go of a model's weights before the graphs are verified.

    The exporter's rewriting rules live as long as the process, and remember the graph that they were last tried on.
    """
    for parameter in model.parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    gc.collect()


def vision_graph(model: Any, recipe: Recipe, *, opset: int, dtype: str = "float32") -> ir.Model:
    inputs, arguments = recipe.inputs(model)
    signature = Signature(inputs, {"image_features": ("num_image_tokens", feature_width(model))})
    graph = convert(Features(recipe.tower(model), model.dtype), (list(arguments),), signature, opset=opset)
    name_tower(graph, "/vision")
    if dtype in BITS:
        halve_kernels(graph)
    graph = _quantized(graph, dtype)
    for name in recipe.optional:
        _make_optional(graph, name)
    return graph


def write_embeddings(model: Any, folder: Path, *, opset: int, dtype: str, merging: bool) -> None:
    """Write the embedding's graph and, with `merging`, one that puts a picture's features in place too. They share one
    file of weights.

    In int8 and int4 the model's table is rounded for good, so that the decoder that is exported next knows it.
    """
    table = Table.round(model.get_input_embeddings()) if dtype in BITS else None
    path = folder / f"{EMBEDDING}{SUFFIX[dtype]}.onnx"
    write_model(embedding_graph(model, table, opset=opset), path, always_outside=merging)
    if merging:
        graph = embedding_graph(model, table, opset=opset, merging=True)
        share_file(graph, ir.load(path))
        ir.save(graph, folder / f"{MERGING}{SUFFIX[dtype]}.onnx")


def share_file(model: ir.Model, stored: ir.Model) -> None:
    """Let a graph take from the file of another what that has outside of its graph, whatever either calls it."""
    outside = [value.const_value for value in stored.graph.initializers.values()]
    for value in model.graph.initializers.values():
        own = value.const_value
        assert own is not None
        for tensor in outside:
            if isinstance(tensor, ir.ExternalTensor) and (tensor.dtype, tensor.shape) == (own.dtype, own.shape):
                value.const_value = tensor if np.array_equal(tensor.numpy(), own.numpy()) else own


def embedding_graph(model: Any, table: Table | None, *, opset: int, merging: bool = False) -> ir.Model:
    width = feature_width(model)
    tokens = ("batch_size", "sequence_length")
    inputs: dict[str, Shape] = {"input_ids": tokens}
    if merging:
        inputs["image_features"] = ("num_image_tokens", width)
    signature = Signature(inputs, {"inputs_embeds": (*tokens, width)})
    example = list(signature.example({"image_features": torch.float32}).values())
    graph = convert(Float32(Embedding(model), model.dtype), (example,), signature, opset=opset)
    name_tower(graph, "/embedding")
    if table:
        table.store(graph)
    return graph


def decoder_graph(model: Any, recipe: Recipe, *, opset: int, dtype: str = "float32") -> ir.Model:
    """The decoder of a guarded model; of a stock one, the plain graph to compare with."""
    decoder = Decoder(model).eval()
    signature = decoder.signature(recipe.position_axes, recipe.extra)
    graph = convert(decoder, decoder.example(signature), signature, opset=opset)
    family = family_of(stock_type(model.config.model_type))
    name_decoder(graph, {role: f"model.{family.modules[role]}" for role in ("blocks", "norm", "head")})
    graph = _quantized(graph, dtype)
    if decoder.guarded:
        run_where(graph, "/sasa/lane", result="unsafe_probability", fill=float("nan"), predicate="is_due")
    for name in recipe.extra:
        _make_optional(graph, name)
    return graph


def _quantized(graph: ir.Model, dtype: str) -> ir.Model:
    if dtype in BITS:
        quantize(graph, dtype)
        common.RemoveUnusedNodesPass()(graph)
        deduplicate(graph)
    return graph


def _make_optional(model: ir.Model, name: str) -> None:
    """Give an input the default of one zero, (1, 1): ONNX calls it an initializer that can be overridden."""
    value = next(value for value in model.graph.inputs if value.name == name)
    value.shape = ir.Shape([None, None])
    value.const_value = ir.tensor([[0]], dtype=ir.DataType.INT64, name=name)
    model.graph.register_initializer(value)


def write_model(model: ir.Model, path: Path, *, always_outside: bool = False) -> None:
    """Write one graph; many weights go into a file beside it."""
    stored = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    size = sum(tensor.nbytes for tensor in stored if tensor is not None)
    if size <= EXTERNAL_ABOVE and not always_outside:
        ir.save(model, path)
        return
    # onnxruntime-web finds no file for what a branch holds, so that stays in the graph.
    branches = (graph for graph in model.graphs() if graph is not model.graph)
    held = (value.const_value for graph in branches for value in graph.initializers.values())
    inside = max((tensor.nbytes for tensor in held if tensor is not None), default=0)
    ir.save(model, path, external_data=f"{path.name}_data", size_threshold_bytes=max(SMALL, inside + 1))
