"""An opened decoder: what its graph and its configuration say together, before anything of it runs."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common

from sasa_export.errors import OpenError, TraceError, reworded
from sasa_export.foreign.blocks import OTHER, Blocks, find_blocks
from sasa_export.foreign.lane import Builder
from sasa_export.foreign.opened import LAYERS, Graphs
from sasa_export.graph import LayerGraph, Node
from sasa_export.models.load import Sizes
from sasa_export.verify.fresh.onnx_model import Model, processor_of, session

DTYPES = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}
ROUNDED = ("MatMulNBits", "MatMulBnb4")  # products whose kernels go by the number of tokens in a call
HIDDEN, HEADS = ("hidden_size", "n_embd", "d_model"), ("num_attention_heads", "n_head", "n_heads")


class Decoder:
    """A decoder, with what writes its prompts. SasaExportError says what is missing or not known.

    Attributes:
        graph: the main lane; its modules are what the decoder calls the values of the hidden state.
        dtype: that of the cache, by which tolerances go; exact: it is float32, and the products are too.
        sees: prompts with pictures can be run through the graphs that lie beside it.
        linear, lengths: as `Blocks` has them.
    """

    def __init__(self, graphs: Graphs) -> None:
        self.graphs, self.source = graphs, graphs.source
        blocks = self.blocks()
        if blocks.text.name == "inputs_embeds" and "embedding" not in graphs.files:
            what = f"reads embeddings, and {self.source.directory} has no graph that makes them (embed_tokens.onnx)"
            raise OpenError(f"{graphs.decoder} {what}. Put it there.")
        hidden, vocabulary = graphs.size(*HIDDEN), list(blocks.logits.shape or [None])[-1]
        vocabulary = vocabulary if isinstance(vocabulary, int) else graphs.size("vocab_size")
        width = list(blocks.text.shape or [None])[-1] if blocks.text.name == "inputs_embeds" else hidden
        dtype = DTYPES.get(blocks.key.dtype)  # type: ignore[arg-type]
        if not hidden or not vocabulary or (isinstance(width, int) and width != hidden) or dtype is None:
            raise TraceError(
                f"the decoder reads states {width} wide and has a cache of {dtype}, and its configuration says "
                f"hidden_size {hidden} and vocab_size {vocabulary}: the gate cannot read it. {OTHER}"
            )
        self.dtype, self.linear, self.lengths = dtype, blocks.linear, blocks.lengths
        self.exact = dtype == "float32" and not any(node.op_type in ROUNDED for node in blocks.model.graph)
        softcap = None if blocks.linear else float(graphs.size("final_logit_softcapping") or 0)  # the graph has it
        self.sizes, self.graph = Sizes(len(blocks.states), hidden, vocabulary, softcap), _main_lane(blocks)
        self.processor, self.sees = _processor(graphs)

    def blocks(self) -> Blocks:
        """The decoder, taken apart anew, since whoever adds to its graph changes it. TraceError where it is not known.

        `lengths` are those of the cache's axes.
        """
        graphs = self.graphs
        blocks = find_blocks(ir.load(graphs.decoder), graphs.size(*LAYERS))
        hidden, heads = graphs.size(*HIDDEN), graphs.size(*HEADS)
        size = graphs.size("head_dim", "head_size") or (hidden // heads if hidden and heads else None)
        known = {1: graphs.size("num_key_value_heads") or heads, 3: size}  # by axis
        keys = [value for name, value in blocks.past.items() if name.endswith((".key", ".value"))]
        named = ((axis, length) for value in keys for axis, length in enumerate(value.shape or ()))
        lengths = {str(length.value): known.get(axis) for axis, length in named if not isinstance(length, int)}
        blocks = replace(blocks, lengths={name: length for name, length in lengths.items() if length})
        sizes = [blocks.sizes(value) for value in keys]
        if not sizes or not all(len(found) == 4 and found[1] and found[3] for found in sizes):
            raise TraceError(
                f"the cache has no keys (past_key_values.0.key), (batch, heads, tokens, size) with heads and size in "
                f"the graph or in a configuration, beside which the gate's would lie. {OTHER}"
            )
        # The builder's half precision notes shapes that do not hold behind a past, and onnxruntime stops at them.
        for value in (value for node in blocks.model.graph for value in node.outputs if not value.is_graph_output()):
            value.shape = None
        return blocks

    def run(self, blocks: Blocks, outputs: dict[str, ir.Value] | None = None) -> Model:
        """The graphs with a decoder as it is in memory, whose weights stay in their files; with other `outputs` than
        its own, they are float32."""
        graph = blocks.model.graph
        if outputs is not None:
            graph.outputs.clear()
            for name, value in outputs.items():
                wide = Builder(graph, f"/sasa/{name}")("Cast", value, to=ir.DataType.FLOAT)
                wide.name, wide.type = name, ir.TensorType(ir.DataType.FLOAT)
                graph.outputs.append(wide)
        graph.sort()
        common.RemoveUnusedNodesPass()(blocks.model)
        held, path = ir.serde.serialize_model(blocks.model), self.graphs.decoder
        folder = path.resolve().parent
        for entry in (entry for tensor in held.graph.initializer for entry in tensor.external_data):
            if entry.key == "location":  # onnxruntime follows no links out of the folder, such as the hub's cache has
                entry.value = os.path.relpath((path.parent / entry.value).resolve(), folder)
        ready = session(held.SerializeToString(), "cpu", folder)
        return Model(self.source.directory, "", "cpu", {"graphs": self.graphs.files, "lengths": blocks.lengths}, ready)


def _main_lane(blocks: Blocks) -> LayerGraph:
    nodes = [Node("embed", "embed", (), blocks.text.name)]
    for index, state in enumerate(blocks.states):
        nodes.append(Node(f"layers.{index}", "block", (nodes[-1].name,), state.name, {"index": index}))
    nodes += [
        Node("norm", "norm", (nodes[-1].name,), blocks.norm.name),
        Node("head", "head", ("norm",), blocks.head.name),
    ]
    return LayerGraph((*nodes, *([] if blocks.linear else [Node("after_head", "after_head", ("head",))])))


def _processor(graphs: Graphs) -> tuple[Any, bool]:
    """What writes prompts, and whether it sees pictures: onnxruntime-genai keeps what makes pixels in its own words."""
    directory = graphs.source.directory
    if {"vision", "embedding"} <= set(graphs.files):
        with suppress(Exception):  # transformers', of files in as many ways as there are processors
            found = processor_of(directory, pictures=True)
            if hasattr(found, "image_processor") and found.chat_template is not None:
                return found, True
    with reworded(OpenError, f"{directory} has no usable tokenizer ({{reason}}). Restore its files."):
        found = processor_of(directory, pictures=False)
    if found.chat_template is None:
        raise OpenError(f"{directory} has no chat template, so its prompts cannot be written. Put one there.")
    return found, False
