"""An opened decoder: what its graph and its configuration say together, before anything of it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from sasa_export.errors import OpenError, TraceError
from sasa_export.foreign.blocks import OTHER, Blocks, find_blocks
from sasa_export.foreign.opened import LAYERS, Graphs
from sasa_export.graph import LayerGraph, Node
from sasa_export.models.load import Sizes
from sasa_export.prompts.prompt import Prompt
from sasa_export.verify.fresh.onnx_model import processor_of

SELF_TEST = Prompt("self-test", "Which of these two is larger, and why?", 0, "self-test")


@dataclass(frozen=True)
class Decoder:
    """`main` is the main lane as a graph of blocks, and `dtype` that of its cache, by which tolerances go. `sees`:
    prompts with pictures can be run through the graphs that lie beside it. `linear` as `Blocks` has it."""

    graphs: Graphs
    processor: Any
    sizes: Sizes
    main: LayerGraph
    dtype: str
    linear: bool
    sees: bool

    @property
    def features(self) -> int:
        """How many numbers the probe reads."""
        return self.sizes.hidden if self.linear else self.sizes.vocabulary


def open_decoder(graphs: Graphs) -> Decoder:
    """Take the decoder apart, and read what writes its prompts. SasaExportError says what is missing or not known."""
    blocks, directory = load_blocks(graphs), graphs.source.directory
    if blocks.text.name == "inputs_embeds" and "embedding" not in graphs.files:
        raise OpenError(
            f"{graphs.decoder} reads embeddings, and {directory} has no graph that makes them (embed_tokens.onnx). "
            "Put it there."
        )
    hidden = graphs.size("hidden_size", "n_embd", "d_model")
    width = (blocks.text.shape or [None])[-1] if blocks.text.name == "inputs_embeds" else hidden
    vocabulary = (blocks.logits.shape or [None])[-1]
    vocabulary = vocabulary if isinstance(vocabulary, int) else graphs.size("vocab_size")
    if hidden is None or vocabulary is None or width not in (hidden, *([] if isinstance(width, int) else [width])):
        raise TraceError(
            f"the decoder reads embeddings {width} wide, and its configuration says hidden_size {hidden} and "
            f"vocab_size {vocabulary}. {OTHER}"
        )
    softcap = None if blocks.linear else float(graphs.size("final_logit_softcapping") or 0)
    dtype = next(str(value.dtype) for name, value in blocks.past.items() if name.endswith(".key"))
    processor, sees = _processor(graphs)
    sizes = Sizes(len(blocks.states), hidden, vocabulary, softcap)
    kind = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16"}.get(dtype)
    if kind is None:
        raise TraceError(f"the cache is of type {dtype}, which cannot hold the gate's states. {OTHER}")
    return Decoder(graphs, processor, sizes, _main(blocks), kind, blocks.linear, sees)


def load_blocks(graphs: Graphs) -> Blocks:
    """The decoder, taken apart, the sizes of its cache written into it. TraceError where one is not known."""
    blocks = find_blocks(ir.load(graphs.decoder), graphs.size(*LAYERS))
    hidden, heads = (
        graphs.size("hidden_size", "n_embd", "d_model"),
        graphs.size("num_attention_heads", "n_head", "n_heads"),
    )
    usual = graphs.size("head_dim", "head_size") or (hidden // heads if hidden and heads else None)
    known = {1: graphs.size("num_key_value_heads") or heads, 3: usual}  # by axis
    for value in (*blocks.model.graph.inputs, *blocks.model.graph.outputs):
        if str(value.name).endswith((".key", ".value")):
            sizes = [
                size if isinstance(size, int) else known.get(axis, size) for axis, size in enumerate(value.shape or ())
            ]
            if len(sizes) != 4 or None in sizes:
                raise TraceError(
                    f"{value.name} has the shape {value.shape}, and no configuration names its heads. {OTHER}"
                )
            value.shape = ir.Shape(sizes)
    if not any(name.endswith(".key") for name in blocks.past):
        raise TraceError(f"the cache has no keys (past_key_values.0.key), beside which the gate's would lie. {OTHER}")
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
    """What writes prompts, and whether it and the graphs see pictures."""
    directory = graphs.source.directory
    for pictures in [True, False] if {"vision", "embedding"} <= set(graphs.files) else [False]:
        try:
            processor = processor_of(directory, pictures=pictures)
            if pictures and not hasattr(processor, "image_processor"):
                continue
        except Exception as error:  # transformers', of damaged files in as many ways as there are tokenizers
            if pictures:  # onnxruntime-genai keeps what makes pixels in files of its own
                continue
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise OpenError(f"{directory} has no usable tokenizer ({reason}). Restore its files.") from None
        if processor.chat_template is None:
            raise OpenError(f"{directory} has no chat template, so its prompts cannot be written. Put one there.")
        return processor, pictures
    raise AssertionError
