"""An opened ONNX decoder: the facts in its graph and its configuration, read before the graph runs."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from sasa_export.errors import OpenError, TraceError, reworded
from sasa_export.graph import LayerGraph, Node
from sasa_export.graph.rewrite import LaneSettings
from sasa_export.models.load import Sizes
from sasa_export.onnx.blocks import OTHER, Blocks, find_blocks
from sasa_export.onnx.lane import LANE, Builder, add_lane
from sasa_export.onnx.opened import LAYERS, Graphs
from sasa_export.onnx.run import Model, processor_of, session
from sasa_export.prompts.prompt import Prompt, encoded

DTYPES = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}
ROUNDED = ("MatMulNBits", "MatMulBnb4")  # products whose kernel depends on the number of tokens in a call
SELF_TEST = Prompt("self-test", "Which of these two is larger, and why?", 0, "self-test")
SAME, NARROW = 1e-4, 2e-2  # relative to the largest state: with a float32 cache, with a narrower one
HIDDEN, HEADS = ("hidden_size", "n_embd", "d_model"), ("num_attention_heads", "n_head", "n_heads")


class Decoder:
    """A decoder and its processor. Raises SasaExportError for missing or unknown parts.

    Attributes:
        graph: the main lane. Its modules are the graph's names for the values of the hidden state.
        dtype, exact: the cache's type, which sets the tolerances; whether the cache and all products are float32.
        sees: whether the graphs beside the decoder can run prompts with pictures.
        linear, lengths: as in `Blocks`.
    """

    def __init__(self, graphs: Graphs) -> None:
        self.graphs, self.source = graphs, graphs.source
        blocks = self.blocks()
        if blocks.text.name == "inputs_embeds" and "embedding" not in graphs.files:
            what = f"reads embeddings, and {self.source.directory} has no graph that makes them (embed_tokens.onnx)"
            raise OpenError(f"{graphs.decoder} {what}. Put it there.")
        hidden, vocabulary = graphs.size(*HIDDEN), list(blocks.logits.shape or [None])[-1]
        vocabulary = vocabulary if isinstance(vocabulary, int) else graphs.size("vocab_size")
        dtype = DTYPES.get(blocks.key.dtype)  # type: ignore[arg-type]
        if not hidden or not vocabulary or blocks.width % hidden or dtype is None:
            raise TraceError(
                f"the decoder reads states {blocks.width} wide and has a cache of {dtype}, and its "
                f"configuration says hidden_size {hidden} and vocab_size {vocabulary}: the gate cannot read it. {OTHER}"
            )
        self.dtype, self.linear, self.lengths = dtype, blocks.linear, blocks.lengths
        self.exact = dtype == "float32" and not any(node.op_type in ROUNDED for node in blocks.model.graph)
        softcap = None if blocks.linear else float(graphs.size("final_logit_softcapping") or 0)  # the graph applies it
        self.sizes, self.graph = Sizes(len(blocks.states), hidden, vocabulary, softcap), _main_lane(blocks)
        self.processor, self.sees = _processor(graphs)

    def blocks(self) -> Blocks:
        """Load the graph again, since callers change it, and return its parts. Raises TraceError for an unknown graph.

        `lengths` are the sizes of the cache's named axes.
        """
        graphs = self.graphs
        blocks = find_blocks(ir.load(graphs.decoder), graphs.size(*LAYERS))
        hidden, heads = graphs.size(*HIDDEN), graphs.size(*HEADS)
        size = graphs.size("head_dim", "head_size") or (hidden // heads if hidden and heads else None)
        known = {1: graphs.size("num_key_value_heads") or heads, 3: size}  # axis -> size
        keys = [value for name, value in blocks.past.items() if name.endswith((".key", ".value"))]
        named = ((axis, it) for value in keys for axis, it in enumerate(value.shape or ()) if not isinstance(it, int))
        lengths = {str(it.value): length for axis, it in named if (length := known.get(axis))}
        blocks = replace(blocks, lengths=lengths)
        sizes = [blocks.sizes(value) for value in keys]
        if not sizes or not all(len(found) == 4 and found[1] and found[3] for found in sizes):
            raise TraceError(
                f"the cache has no keys (past_key_values.0.key), (batch, heads, tokens, size) with heads and size in "
                f"the graph or in a configuration, beside which the gate's would lie. {OTHER}"
            )
        # Half-precision graphs of onnxruntime-genai state shapes that are wrong with a past. onnxruntime rejects them.
        for value in (value for node in blocks.model.graph for value in node.outputs if not value.is_graph_output()):
            value.shape = None
        return blocks

    def check_lane(self, settings: LaneSettings) -> str:
        """Test the second lane, and return the result as text. Raises TraceError where the lane, started on the safety
        layer's own state, does not end as the main lane does, or ends there from another state, too."""
        blocks, inputs = self.blocks(), encoded(self.processor, SELF_TEST)
        assert settings.pair is not None
        safety = settings.pair[0]
        ends = {
            name: add_lane(blocks, safety, blocks.states[index], prefix=f"{LANE}/{name}")
            for name, index in zip(("same", "other"), settings.pair, strict=True)
        }
        values = self.run(blocks, {"main": blocks.norm, **ends}).prompt(inputs)
        main, same, other = (values[name].numpy() for name in ("main", *ends))  # (1, tokens, hidden) each
        if main.shape != (*inputs["input_ids"].shape, self.sizes.hidden) or same.shape != main.shape:
            raise TraceError(f"{blocks.norm.name} is {main.shape}, so it is no final norm of all tokens. {OTHER}")
        apart, control = (float(np.abs(end - main).max() / np.abs(main).max()) for end in (same, other))
        most = SAME if self.dtype == "float32" else NARROW
        if not apart <= most < control:
            raise TraceError(
                f"{blocks.states[safety].name}: begun with what lies behind block {safety}, the second lane ends "
                f"{apart:.1e} from the main lane, where at most {most:g} may be, and begun with another state "
                f"{control:.1e}. {OTHER}"
            )
        return f"{len(blocks.states)} blocks; begun as the main lane, the second one ends {apart:.0e} from it"

    def run(self, blocks: Blocks, outputs: dict[str, ir.Value] | None = None) -> Model:
        """Return the graphs with this decoder, which is in memory; its weights stay in their files. `outputs` replace
        the decoder's own, as float32."""
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
            if entry.key == "location":  # onnxruntime follows no links out of the folder, as in the hub's cache
                entry.value = os.path.relpath((path.parent / entry.value).resolve(), folder)
        ready = session(held.SerializeToString(), "cpu", folder)
        told = {"graphs": self.graphs.files, "lengths": blocks.lengths}
        return Model(self.source.directory, told=told, decoder=ready)


def _main_lane(blocks: Blocks) -> LayerGraph:
    nodes = [Node("embed", "embed", (), blocks.text.name)]
    for index, state in enumerate(blocks.states):
        nodes.append(Node(f"layers.{index}", "block", (nodes[-1].name,), state.name, {"index": index}))
    nodes.append(Node("norm", "norm", (nodes[-1].name,), blocks.norm.name))
    nodes.append(Node("head", "head", ("norm",), blocks.head.name))
    return LayerGraph((*nodes, *([] if blocks.linear else [Node("after_head", "after_head", ("head",))])))


def _processor(graphs: Graphs) -> tuple[Any, bool]:
    """Return the processor, and whether it reads pictures. It cannot read onnxruntime-genai's picture settings."""
    directory = graphs.source.directory
    if {"vision", "embedding"} <= set(graphs.files):
        with suppress(Exception):  # every processor of transformers has its own errors
            found = processor_of(directory, pictures=True)
            if hasattr(found, "image_processor") and found.chat_template is not None:
                return found, True
    with reworded(OpenError, f"{directory} has no usable tokenizer ({{reason}}). Restore its files."):
        found = processor_of(directory, pictures=False)
    if found.chat_template is None:
        raise OpenError(f"{directory} has no chat template, so its prompts cannot be written. Put one there.")
    return found, False
