"""Where the blocks, the final norm and the head of a decoder are in a graph that somebody else exported."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

import onnx_ir as ir

from sasa_export.errors import TraceError
from sasa_export.writers.onnx.passes.branch import needed, reads

PAST = re.compile(r"past\w*\.(\d+)(?:\.(\w+))?")  # past_key_values.3.key, past_conv.3
TEXT = ("input_ids", "inputs_embeds")
TAKEN = (*TEXT, "attention_mask", "position_ids", "num_logits_to_keep")
SHAPE = ("Shape", "Size")  # they read of a value how large it is, and nothing else
WITH_SUM = ("SkipSimplifiedLayerNormalization", "SkipLayerNormalization")  # norms whose output 3 is the sum before them
PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "MatMulNBits", "MatMulBnb4", "Conv")
CUTS = ("Slice", "Gather", "GatherND", "Squeeze", "Unsqueeze", "Reshape")  # what may take the last token alone
LINEAR = ("Cast", "Identity", "Mul", "Div", "Add", "Transpose", *CUTS)  # of one value that is no constant
DYNAMIC = ("DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat")
OTHER = "Use another model, or another export of it."


@dataclass(frozen=True)
class Blocks:
    """A decoder's graph, taken apart.

    `states` are the outputs of its blocks, (batch, tokens, hidden), `norm` the final norm's output of all tokens, and
    `read` what of it the `head`, the product with the vocabulary, reads. `linear`: behind the head nothing but
    constants is multiplied or added, so that a probe folds through it.
    """

    model: ir.Model
    states: tuple[ir.Value, ...]
    norm: ir.Value
    read: ir.Value
    head: ir.Node
    linear: bool

    @property
    def inputs(self) -> dict[str, ir.Value]:
        return {str(value.name): value for value in self.model.graph.inputs}

    @property
    def past(self) -> dict[str, ir.Value]:
        return {name: value for name, value in self.inputs.items() if PAST.fullmatch(name)}

    @property
    def text(self) -> ir.Value:
        """What the decoder reads: token ids (batch, tokens), or embeddings (batch, tokens, hidden)."""
        return next(self.inputs[name] for name in TEXT if name in self.inputs)

    @property
    def logits(self) -> ir.Value:
        return output(self.model.graph, "logits")


def output(graph: ir.Graph, name: str) -> ir.Value:
    return next(value for value in graph.outputs if value.name == name)


def named(node: ir.Node) -> str:
    return f"{node.name or node.outputs[0].name} ({node.op_type})"


def find_blocks(model: ir.Model, count: int | None) -> Blocks:
    """Take a decoder apart, whose configuration names `count` blocks, if it names any.

    Raises TraceError, which names the node, wherever the graph is not certainly what it is taken for.
    """
    return _Finder(model).find(count)


class _Finder:
    """The graph in order, who reads each value, and which values are not the same in every call."""

    def __init__(self, model: ir.Model) -> None:
        self.model, graph = model, model.graph
        _check_interface(graph)
        graph.sort()  # some converters leave their casts at its end
        self.nodes = list(graph)
        self.readers: dict[ir.Value, list[ir.Node]] = defaultdict(list)
        self.varying = {value for value in graph.inputs if not value.is_initializer()}
        for node in self.nodes:
            given = list(reads(node))
            for value in given:
                self.readers[value].append(node)
            if self.varying.intersection(given):
                self.varying.update(node.outputs)

    def find(self, count: int | None) -> Blocks:
        anchors = self.anchors()
        if count is not None and count != len(anchors):
            raise TraceError(
                f"the decoder has a cache for {len(anchors)} blocks, and its configuration names {count}: a block that "
                f"reads the keys of another cannot run in a second lane. {OTHER}"
            )
        logits = output(self.model.graph, "logits")
        head, linear = self.head(logits)
        (read,) = self.varying_of(head)
        norm = self.before_cuts(read)
        chains = self.joints(anchors, logits)
        states = tuple(self.behind(index, anchors, chains[index], norm) for index in range(len(anchors)))
        return Blocks(self.model, states, norm, read, head, linear)

    def varying_of(self, node: ir.Node) -> list[ir.Value]:
        return [value for value in node.inputs if value in self.varying]

    def anchors(self) -> list[ir.Node]:
        """The node of each block that reads what its cache holds, behind casts."""
        order = {node: place for place, node in enumerate(self.nodes)}
        found: dict[int, ir.Node] = {}
        for value in self.model.graph.inputs:
            match = PAST.fullmatch(str(value.name))
            if match is None or match[2] == "key":
                continue
            index, held = int(match[1]), value
            while len(self.readers[held]) == 1 and self.readers[held][0].op_type in ("Cast", "Identity"):
                held = self.readers[held][0].outputs[0]
            reading = [node for node in self.readers[held] if node.op_type not in SHAPE]
            if not reading:
                raise TraceError(f"no node reads {value.name}, so block {index} has no cache of its own. {OTHER}")
            node = found[index] = min(reading, key=order.__getitem__)
            if has_branches(node):
                raise TraceError(f"{named(node)} holds the decoder in branches. Use one that is not merged.")
            said = re.search(r"layers?[./](\d+)", str(node.name))
            if said and int(said[1]) != index:
                raise TraceError(f"{named(node)} reads {value.name}, which is another block's. {OTHER}")
        lacking = [index for index in range(max(found, default=0) + 1) if index not in found]
        if lacking:
            raise TraceError(f"block {lacking[0]} has no cache of its own, so it cannot run in a second lane. {OTHER}")
        return [found[index] for index in sorted(found)]

    def head(self, logits: ir.Value) -> tuple[ir.Node, bool]:
        """The product that makes the logits, and whether only constants are multiplied or added behind it."""
        value, linear = logits, True
        while True:
            node = value.producer()
            given = [] if node is None else self.varying_of(node)
            if node is not None and node.op_type in CUTS:
                given = given[:1]  # which tokens are kept is another input
            if node is None or len(given) != 1:
                what = value.name if node is None else named(node)
                raise TraceError(f"{what}: from the logits back, no head is found. {OTHER}")
            if node.op_type in PRODUCTS:
                return node, linear
            linear &= node.op_type in LINEAR
            value = given[0]

    def before_cuts(self, value: ir.Value) -> ir.Value:
        """The value of all tokens, of which this one may be the last."""
        node = value.producer()
        if node is None or not node.inputs or node.inputs[0] is None:
            return value
        before = node.inputs[0].producer()
        cast = node.op_type == "Cast" and before is not None and before.op_type in CUTS
        return self.before_cuts(node.inputs[0]) if cast or node.op_type in CUTS else value

    def joints(self, anchors: list[ir.Node], logits: ir.Value) -> list[list[ir.Node]]:
        """Of each anchor the nodes, in order, through which all goes that it tells the logits (post-dominators)."""
        last, useful = logits.producer(), needed([logits])
        assert last is not None
        following: dict[ir.Node, ir.Node] = {}
        depth = {last: 0}
        for node in reversed(self.nodes):
            told = [
                to for value in node.outputs for to in self.readers[value] if to in depth and to.op_type not in SHAPE
            ]
            if node is last or node not in useful or not told:
                continue
            joint = told[0]
            for other in told[1:]:
                while joint is not other:
                    if depth[joint] < depth[other]:
                        joint, other = other, joint
                    joint = following[joint]
            following[node], depth[node] = joint, depth[joint] + 1
        chains = []
        for node in anchors:
            if node not in following:
                raise TraceError(f"{named(node)}: the logits do not depend on this cache. {OTHER}")
            chain = []
            while node in following:
                node = following[node]
                chain.append(node)
            chains.append(chain)
        return chains

    def behind(self, index: int, anchors: list[ir.Node], chain: list[ir.Node], norm: ir.Value) -> ir.Value:
        """The output of a block: the last joint behind its cache that the next block still reads."""
        last = index + 1 == len(anchors)
        before = needed([norm] if last else reads(anchors[index + 1]))
        joints = [node for node in chain if node in before]
        if last:  # and there, which the norm may end with, the last sum of two that vary
            sums = [node for node in joints if node.op_type == "Add" and len(self.varying_of(node)) == 2]
            joints = [node for node in joints if node.op_type in WITH_SUM or node in sums]
        if not joints:
            raise TraceError(f"{named(anchors[index])}: behind block {index} lies no single value. {OTHER}")
        node = joints[-1]
        if node.op_type in WITH_SUM:
            return _sum(node)
        if len(node.outputs) != 1:
            raise TraceError(f"{named(node)}, behind block {index}, has several outputs. {OTHER}")
        return node.outputs[0]


def has_branches(node: ir.Node) -> bool:
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(isinstance(value, ir.Attr) and value.type in kinds for value in node.attributes.values())


def _check_interface(graph: ir.Graph) -> None:
    """TraceError where the decoder takes what nobody knows, is guarded already, or rounds its states by the call."""
    inputs = {str(value.name) for value in graph.inputs if not value.is_initializer()}
    outputs = {str(value.name) for value in graph.outputs}
    if "unsafe_probability" in outputs:
        raise TraceError("the decoder has an output unsafe_probability: it is guarded already. Give the original.")
    for name in sorted(inputs):
        if name not in TAKEN and not PAST.fullmatch(name):
            raise TraceError(f"the decoder has the input {name}, which a second lane would lack. {OTHER}")
    if not any(PAST.fullmatch(name) for name in inputs):
        raise TraceError(f"the decoder has no cache (past_key_values.*) among its inputs. {OTHER}")
    for name in ("attention_mask", "input_ids or inputs_embeds", "logits"):
        if not (inputs | outputs).intersection(name.split(" or ")):
            raise TraceError(f"the decoder has no {name}. {OTHER}")
    for node in graph.all_nodes():
        if node.op_type in DYNAMIC:
            raise TraceError(
                f"{named(node)}: dynamic int8 has one range for all tokens of a call, so a verdict would depend on how "
                "a prompt is cut into calls. Use a variant in float or in 4 bits."
            )


def _sum(node: ir.Node) -> ir.Value:
    """The sum that a fused norm reads: an output of it, which is added where it is missing."""
    if len(node.outputs) < 4:
        node.resize_outputs(4)
    for unnamed in node.outputs:
        unnamed.name = unnamed.name or ""
    value = node.outputs[3]
    if not value.name:
        value.name, value.type = f"{node.outputs[0].name}.sum", node.outputs[0].type
    return value
