"""Finds the blocks, the final norm and the head of a decoder in any ONNX graph."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

import networkx
import onnx_ir as ir

from sasa_export.errors import TraceError
from sasa_export.onnx.branch import needed, reads
from sasa_export.runtime.lane import TYPES

PAST = re.compile(r"past\w*\.(\d+)(?:\.(\w+))?")  # past_key_values.3.key, past_conv.3
TEXT = ("input_ids", "inputs_embeds")
TAKEN = (*TEXT, "attention_mask", "position_ids", "num_logits_to_keep")
SHAPE = ("Shape", "Size")  # operators that read only a value's size
WITH_SUM = ("SkipSimplifiedLayerNormalization", "SkipLayerNormalization")  # output 3: the sum before the norm
PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "MatMulNBits", "MatMulBnb4", "Conv")
CUTS = ("Slice", "Gather", "GatherND", "Squeeze", "Unsqueeze", "Reshape")  # may select the last token
LINEAR = ("Cast", "Identity", "Mul", "Div", "Add", "Transpose", *CUTS)  # if only one input varies
DYNAMIC = ("DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat")
RING = "sliding_window_cache"  # attribute: the cache is a ring buffer as large as the attention window
OTHER = "Use another model, or another export of it."


@dataclass(frozen=True)
class Blocks:
    """The parts of a decoder's graph.

    `text` is its main input: token ids (batch, tokens) or embeddings (batch, tokens, hidden). `states` are the blocks'
    outputs, (batch, tokens, hidden); `norm` is the final norm's output for all tokens. `head` is the product with the
    vocabulary, and `read` its input. `linear`: after the head, the graph only adds constants or multiplies by them,
    and a probe folds through it. `lengths` maps the names of dimensions to sizes.
    """

    model: ir.Model
    inputs: dict[str, ir.Value]
    past: dict[str, ir.Value]
    text: ir.Value
    states: tuple[ir.Value, ...]
    norm: ir.Value
    read: ir.Value
    head: ir.Node
    logits: ir.Value
    linear: bool
    lengths: dict[str, int]

    @property
    def key(self) -> ir.Value:
        """The cache's input for the first block's keys."""
        return next(value for name, value in self.past.items() if name.endswith(".key"))

    @property
    def width(self) -> int:
        """Width of the embedding input, including features that a picture adds after the first blocks. 0 where the
        decoder reads ids, or the graph does not state the width."""
        width = list(self.text.shape or [None])[-1] if self.text.name == "inputs_embeds" else 0
        return width if isinstance(width, int) else 0

    def sizes(self, held: ir.Value) -> list[int]:
        """Return the shape of one cache input, (rows, ...), with 0 for rows, tokens and unknown sizes."""
        sizes = list(held.shape or ())
        return [size if isinstance(size, int) else self.lengths.get(str(size.value), 0) for size in sizes]


def find_blocks(model: ir.Model, count: int | None) -> Blocks:
    """Return the parts of a decoder's graph. `count` is the number of blocks in its configuration, or None.

    Raises TraceError, which names the node, where a part cannot be identified with certainty.
    """
    given = [value for value in model.graph.inputs if value.name in TYPES or not value.is_initializer()]
    inputs = {str(value.name): value for value in given}
    outputs = {str(value.name): value for value in model.graph.outputs}
    past = {name: value for name, value in inputs.items() if PAST.fullmatch(name)}
    _check_interface(set(inputs), set(outputs), set(past))
    _check_nodes(model.graph)
    finder = _Finder(model.graph, outputs["logits"])
    anchors = finder.anchors(past)
    if count is not None and count != len(anchors):
        raise TraceError(
            f"the decoder has a cache for {len(anchors)} blocks, and its configuration names {count}: a block that "
            f"reads the keys of another cannot run in a second lane. {OTHER}"
        )
    head, linear = finder.head()
    (read,) = finder.varying_of(head)
    norm, text = finder.before_cuts(read), next(inputs[name] for name in TEXT if name in inputs)
    states = finder.states(anchors, norm)
    return Blocks(model, inputs, past, text, states, norm, read, head, outputs["logits"], linear, {})


def _check_interface(inputs: set[str], outputs: set[str], past: set[str]) -> None:
    """Raise TraceError where a decoder has unknown inputs, lacks what the gate reads, or is guarded already."""
    if "unsafe_probability" in outputs:
        raise TraceError("the decoder has an output unsafe_probability: it is guarded already. Give the original.")
    types = [name for name in TYPES if name in inputs][:1]  # the second lane gets one of them
    unknown = sorted(inputs - past - {*TAKEN, *types})
    if unknown:
        raise TraceError(f"the decoder has the input {unknown[0]}, which a second lane would lack. {OTHER}")
    there = {"attention_mask": "attention_mask" in inputs, " or ".join(TEXT): inputs & set(TEXT)}
    there |= {"past_key_values.*": past, "logits": "logits" in outputs}
    lacking = [name for name, found in there.items() if not found]
    if lacking:
        raise TraceError(f"the decoder has no {lacking[0]}. {OTHER}")


def _check_nodes(graph: ir.Graph) -> None:
    """Raise TraceError where the rounding of states depends on the call, or the cache is a ring buffer."""
    for node in graph.all_nodes():
        if node.op_type in DYNAMIC:
            raise TraceError(
                f"{named(node)}: dynamic int8 has one range for all tokens of a call, so a verdict would depend on how "
                "a prompt is cut into calls. Use a variant in float or in 4 bits."
            )
        if RING in node.attributes and node.attributes[RING].as_int():
            raise TraceError(f"{named(node)} keeps its cache in a ring, which has to be full before it begins. {OTHER}")


class _Finder:
    """The sorted graph, the readers of each value, and the values that vary between calls."""

    def __init__(self, graph: ir.Graph, logits: ir.Value) -> None:
        graph.sort()  # some converters append casts at the end
        self.nodes, self.logits = list(graph), logits
        self.readers: dict[ir.Value, list[ir.Node]] = defaultdict(list)
        self.varying = {value for value in graph.inputs if not value.is_initializer()}
        for node in self.nodes:
            given = list(reads(node))
            for value in given:
                self.readers[value].append(node)
            self.varying.update(node.outputs if self.varying.intersection(given) else ())

    def varying_of(self, node: ir.Node) -> list[ir.Value]:
        return [value for value in node.inputs if value in self.varying]

    def anchors(self, past: dict[str, ir.Value]) -> list[ir.Node]:
        """Return the anchor of each block: the first node that reads its cached values, ignoring casts."""
        order = {node: place for place, node in enumerate(self.nodes)}
        found: dict[int, ir.Node] = {}
        for name, held in past.items():
            layer, kind = PAST.fullmatch(name).groups()  # type: ignore[union-attr]
            if kind == "key":
                continue
            while len(self.readers[held]) == 1 and self.readers[held][0].op_type in ("Cast", "Identity"):
                held = self.readers[held][0].outputs[0]
            reading = [node for node in self.readers[held] if node.op_type not in SHAPE]
            if not reading:
                raise TraceError(f"no node reads {name}, so block {layer} has no cache of its own. {OTHER}")
            node = found[int(layer)] = min(reading, key=order.__getitem__)
            said = re.search(r"layers?[./](\d+)", str(node.name))
            if has_branches(node) or (said and said[1] != layer):
                what = "holds the decoder in branches" if has_branches(node) else f"reads {name}, another block's"
                raise TraceError(f"{named(node)} {what}. {OTHER}")
        lacking = set(range(max(found, default=0) + 1)) - set(found)
        if lacking:
            raise TraceError(f"block {min(lacking)} has no cache of its own, so no second lane can run it. {OTHER}")
        return [found[index] for index in sorted(found)]

    def head(self) -> tuple[ir.Node, bool]:
        """Return the product that makes the logits, and whether the graph after it is linear."""
        value, linear = self.logits, True
        while True:
            node = value.producer()
            given = [] if node is None else self.varying_of(node)
            if node is not None and node.op_type in CUTS:
                given = given[:1]  # the other input selects tokens
            if node is None or len(given) != 1:
                what = value.name if node is None else named(node)
                raise TraceError(f"{what}: from the logits back, no head is found. {OTHER}")
            if node.op_type in PRODUCTS:
                return node, linear
            linear &= node.op_type in LINEAR
            value = given[0]

    def before_cuts(self, value: ir.Value) -> ir.Value:
        """Return the value of all tokens from which this value was selected, or the value itself."""
        node = value.producer()
        first = node.inputs[0] if node is not None and node.inputs else None
        before = first.producer() if first is not None else None
        if node is None or first is None:
            return value
        cast = node.op_type == "Cast" and before is not None and before.op_type in CUTS
        return self.before_cuts(first) if cast or node.op_type in CUTS else value

    def states(self, anchors: list[ir.Node], norm: ir.Value) -> tuple[ir.Value, ...]:
        """Return the output of each block: the last post-dominator of the block's cache read that the next block still
        reads."""
        following, found = self.following(), []
        for index, anchor in enumerate(anchors):
            last = index + 1 == len(anchors)
            before = needed([norm] if last else reads(anchors[index + 1]))
            state, node = None, following.get(anchor)
            while node is not None:
                # After the last block, a sum with a constant may belong to the norm.
                summed = node.op_type in WITH_SUM or (node.op_type == "Add" and len(self.varying_of(node)) == 2)
                state = node if node in before and (summed or not last) else state
                node = following.get(node)
            if state is None:
                raise TraceError(f"{named(anchor)}: behind block {index} lies no single value. {OTHER}")
            if state.op_type not in WITH_SUM and len(state.outputs) != 1:
                raise TraceError(f"{named(state)}, behind block {index}, has several outputs. {OTHER}")
            found.append(_sum(state) if state.op_type in WITH_SUM else state.outputs[0])
        return tuple(found)

    def following(self) -> dict[ir.Node, ir.Node]:
        """Return each node's immediate post-dominator towards the logits."""
        told = networkx.DiGraph(
            (reader, node)
            for node in self.nodes
            for value in node.outputs
            for reader in self.readers[value]
            if reader.op_type not in SHAPE
        )
        end = self.logits.producer()
        found = networkx.immediate_dominators(told, end)
        return {node: first for node, first in found.items() if node is not end}


def _sum(node: ir.Node) -> ir.Value:
    """Return the output of a fused norm that holds the sum before the norm. A missing output is added."""
    if len(node.outputs) < 4:
        node.resize_outputs(4)
    for value in node.outputs:
        value.name = value.name or ""
    if not node.outputs[3].name:
        node.outputs[3].name, node.outputs[3].type = f"{node.outputs[0].name}.sum", node.outputs[0].type
    return node.outputs[3]


def has_branches(node: ir.Node) -> bool:
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(isinstance(value, ir.Attr) and value.type in kinds for value in node.attributes.values())


def named(node: ir.Node) -> str:
    return f"{node.name or node.outputs[0].name} ({node.op_type})"
