"""What the graphs themselves show: whether the second lane is what it should be, and what a probe reads of prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from sasa_export.errors import TraceError
from sasa_export.foreign.blocks import Blocks, find_blocks
from sasa_export.foreign.lane import LANE, Builder, add_head, add_lane, clone
from sasa_export.foreign.opened import Graphs
from sasa_export.verify.fresh.onnx_model import Model, session

SAME = {ir.DataType.FLOAT: 1e-4}  # of the largest state, by the cache's type; float16 and bfloat16 have it wider
ROUNDED = 2e-2


def load_blocks(graphs: Graphs) -> Blocks:
    """The decoder, taken apart, the sizes of its cache written into it. TraceError where one is not known."""
    blocks = find_blocks(ir.load(graphs.decoder), graphs.blocks)
    hidden, heads = graphs.size("hidden_size"), graphs.size("num_attention_heads")
    usual = graphs.size("head_dim", "head_size") or (hidden // heads if hidden and heads else None)
    known = {1: graphs.size("num_key_value_heads") or heads, 3: usual}
    for value in (*blocks.model.graph.inputs, *blocks.model.graph.outputs):
        if str(value.name).endswith((".key", ".value")) and value.shape is not None:
            sizes = [known.get(axis, size) if not isinstance(size, int) else size for axis, size in enumerate(value.shape)]
            if not (len(sizes) == 4 and isinstance(sizes[1], int) and isinstance(sizes[3], int)):
                raise TraceError(f"{value.name} is {value.shape}, whose heads config.json does not name. Add them there.")
            value.shape = ir.Shape(sizes)
    return blocks


def run(graphs: Graphs, blocks: Blocks, outputs: dict[str, ir.Value] | None = None) -> Model:
    """The directory with a decoder as it is in memory; with other `outputs` than its own, they are float32."""
    graph = blocks.model.graph
    if outputs is not None:
        graph.outputs.clear()
        for name, value in outputs.items():
            wide = Builder(graph, f"/sasa/{name}")("Cast", value, to=ir.DataType.FLOAT)
            wide.name, wide.type = name, ir.TensorType(ir.DataType.FLOAT)
            graph.outputs.append(wide)
        graph.sort()
        common.RemoveUnusedNodesPass()(blocks.model)
    held = ir.serde.serialize_model(blocks.model).SerializeToString()
    decoder = session(held, "cpu", graphs.decoder.parent)
    return Model(graphs.source.directory, "", "cpu", graphs.files, decoder)


def check_lane(graphs: Graphs, pair: tuple[int, int], inputs: dict[str, Any]) -> float:
    """How far from the main lane's end the second one ends, of the largest state, where it begins with the very state
    behind the safety layer. TraceError where it is too far, or where the lane does not care what it begins with.

    Args: inputs: a prompt's.
    """
    blocks = load_blocks(graphs)
    positions, dtype = blocks.inputs.get("position_ids"), next(iter(blocks.past.values())).dtype
    lanes = {name: add_lane(blocks, pair[0], blocks.states[index], positions, f"{LANE}/{name}") for name, index in zip(("same", "other"), pair, strict=True)}
    values = run(graphs, blocks, {"main": blocks.norm, **lanes}).prompt(inputs)
    main, same, other = (values[name].numpy() for name in ("main", *lanes))  # (1, tokens, hidden) each
    if main.shape[:2] != inputs["input_ids"].shape or same.shape != main.shape:
        raise TraceError(f"{blocks.norm.name} is {main.shape}, and not of all tokens, so no final norm. Use another export.")
    largest = np.abs(main).max()
    apart, control = (float(np.abs(end - main).max() / largest) for end in (same, other))
    most = SAME.get(dtype, ROUNDED) if dtype is not None else ROUNDED
    if not apart <= most < control:
        begun = blocks.states[pair[0]].name
        raise TraceError(
            f"{begun}: the second lane, begun with the state behind block {pair[0]}, ends {apart:.1e} from the main lane, "
            f"and begun with another {control:.1e}; at most {most:g} and more than that was expected. Use another export."
        )
    return apart


def lanes(graphs: Graphs, pair: tuple[int, int], epsilon: float) -> Model:
    """The graphs with both lanes' first-token features as outputs, "projected" and "plain", (1, features)."""
    blocks = load_blocks(graphs)
    add = Builder(blocks.model.graph, "/sasa/features")
    safety, semantic = (add("Cast", blocks.states[index], to=ir.DataType.FLOAT) for index in pair)
    axis, least = add.constant([-1]), add.constant(epsilon, np.float32)
    along, square = (add("ReduceSum", add("Mul", state, semantic), axis, keepdims=1) for state in (safety, semantic))
    projection = add("Mul", add("Div", along, add("Max", square, least)), semantic)  # (1, tokens, hidden)
    end = add_lane(blocks, pair[0], projection, blocks.inputs.get("position_ids"))
    last = add.constant(-1)
    ends = {"projected": add("Gather", end, last, axis=1), "plain": add("Gather", blocks.norm, last, axis=1)}
    if not blocks.linear:
        ends = {name: add_head(blocks, value, f"/sasa/{name}") for name, value in ends.items()}
    return run(graphs, blocks, ends)


def features(model: Model, inputs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Of one prompt, by `lanes`: projected and plain, (features,) each."""
    values = model.prompt(inputs)
    return values["projected"].numpy()[0], values["plain"].numpy()[0]


def head_of(graphs: Graphs, hidden: int) -> np.ndarray:
    """The head's weights, (vocabulary, hidden), float32, whatever they are stored in: what it makes of unit vectors."""
    blocks = load_blocks(graphs)
    graph, kind = blocks.model.graph, ir.TensorType(ir.DataType.FLOAT)
    units = ir.Value(name="units", type=kind, shape=ir.Shape([1, hidden, hidden]))
    read = Builder(graph, "/sasa/units")("CastLike", units, blocks.read)
    made = clone(graph, blocks.head.outputs[0], {blocks.read: read}, "/sasa/units")
    ...
    raise NotImplementedError
