"""An opened decoder: what its graph and its configuration say together, before anything of it runs."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from sasa_export.errors import OpenError, TraceError, reworded
from sasa_export.foreign.blocks import OTHER, Blocks, find_blocks
from sasa_export.foreign.opened import LAYERS, Graphs
from sasa_export.graph import LayerGraph, Node
from sasa_export.models.load import Sizes
from sasa_export.prompts.prompt import Prompt
from sasa_export.report import Silent
from sasa_export.verify.fresh.onnx_model import processor_of

DTYPES = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}
ROUNDED = ("MatMulNBits", "MatMulBnb4")  # products whose kernels go by the number of tokens in a call
HIDDEN, HEADS = ("hidden_size", "n_embd", "d_model"), ("num_attention_heads", "n_head", "n_heads")


@dataclass(frozen=True)
class Decoder:
    """`main` is the main lane as a graph of blocks, and `dtype` that of its cache, by which tolerances go: `exact` is
    one in float32 whose products are too. `sees`: prompts with pictures can be run through the graphs that lie beside
    it. `linear` and `lengths` as `Blocks` has them."""

    graphs: Graphs
    processor: Any
    sizes: Sizes
    main: LayerGraph
    dtype: str
    exact: bool
    linear: bool
    lengths: dict[str, int]
    sees: bool

    def readable(self, prompts: list[Prompt], report: Silent) -> list[Prompt]:
        """The prompts that can be run through the graphs."""
        found = [prompt for prompt in prompts if self.sees or prompt.image is None]
        if len(found) < len(prompts):
            report.warn("pictures cannot be run through these graphs here, so only prompts of text are used.")
        return found


def open_decoder(graphs: Graphs) -> Decoder:
    """Take the decoder apart, and read what writes its prompts. SasaExportError says what is missing or not known."""
    blocks, directory = load_blocks(graphs), graphs.source.directory
    if blocks.text.name == "inputs_embeds" and "embedding" not in graphs.files:
        what = f"{graphs.decoder} reads embeddings, and {directory} has no graph that makes them (embed_tokens.onnx)"
        raise OpenError(f"{what}. Put it there.")
    hidden, vocabulary = graphs.size(*HIDDEN), list(blocks.logits.shape or [None])[-1]
    vocabulary = vocabulary if isinstance(vocabulary, int) else graphs.size("vocab_size")
    width = list(blocks.text.shape or [None])[-1] if blocks.text.name == "inputs_embeds" else hidden
    dtype = DTYPES.get(next(value.dtype for name, value in blocks.past.items() if name.endswith(".key")))  # type: ignore[arg-type]
    if not hidden or not vocabulary or (isinstance(width, int) and width != hidden) or dtype is None:
        raise TraceError(
            f"the decoder reads states {width} wide and has a cache of {dtype}, and its configuration says hidden_size "
            f"{hidden} and vocab_size {vocabulary}: the gate cannot read it. {OTHER}"
        )
    processor, sees = _processor(graphs)
    softcap = None if blocks.linear else float(graphs.size("final_logit_softcapping") or 0)  # the graph has it in it
    sizes = Sizes(len(blocks.states), hidden, vocabulary, softcap)
    exact = dtype == "float32" and not any(node.op_type in ROUNDED for node in blocks.model.graph)
    return Decoder(graphs, processor, sizes, _main(blocks), dtype, exact, blocks.linear, blocks.lengths, sees)


def load_blocks(graphs: Graphs) -> Blocks:
    """The decoder, taken apart, with the lengths of its cache's axes. TraceError where one is not known."""
    blocks = find_blocks(ir.load(graphs.decoder), graphs.size(*LAYERS))
    hidden, heads = graphs.size(*HIDDEN), graphs.size(*HEADS)
    size = graphs.size("head_dim", "head_size") or (hidden // heads if hidden and heads else None)
    known = {1: graphs.size("num_key_value_heads") or heads, 3: size}  # by axis
    keys = {name: value for name, value in blocks.past.items() if name.endswith((".key", ".value"))}
    named = ((axis, length) for value in keys.values() for axis, length in enumerate(value.shape or ()))
    lengths = {str(length.value): known.get(axis) for axis, length in named if not isinstance(length, int)}
    blocks = replace(blocks, lengths={name: length for name, length in lengths.items() if length})
    if not keys or any(
        len(sizes := blocks.sizes(value)) != 4 or not (sizes[1] and sizes[3]) for value in keys.values()
    ):
        raise TraceError(
            f"the cache has no keys (past_key_values.0.key), (batch, heads, tokens, size) with heads and size in the "
            f"graph or in a configuration, beside which the gate's would lie. {OTHER}"
        )
    # The builder's half precision notes shapes that do not hold behind a past, and onnxruntime stops at them.
    for value in (value for node in blocks.model.graph for value in node.outputs if not value.is_graph_output()):
        value.shape = None
    return blocks


def _main(blocks: Blocks) -> LayerGraph:
    """The main lane as data: modules are what the graph calls the values of the hidden state."""
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
