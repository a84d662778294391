"""Moves part of a graph into an `If`, so that only the calls that need it pay for it.

Shared weights and activations are captured from the outer graph. Initializers that only the branch uses move inside:
tools that rewrite graphs drop an initializer that no outer node reads.
"""

from collections.abc import Collection, Iterable, Iterator

import onnx_ir as ir

RESULT, CONDITION = "unsafe_probability", "is_due"  # outputs of the guard: (batch,), and a bool ()


def judge_where_due(graph: ir.Graph, name: str) -> None:
    """Move what only P(unsafe) needs into an `If` node of this name. Where no verdict is due, P(unsafe) is NaN.

    The condition is no longer an output. The graph's first input is (batch, tokens) or (batch, tokens, hidden).
    """
    outputs = {str(value.name): value for value in graph.outputs}
    computed, condition = outputs[RESULT], outputs.pop(CONDITION)
    others = [value for value in graph.outputs if value is not computed]
    members = needed([computed]) - needed(others, stop={computed})
    inside = [node for node in graph if node in members]
    own = [value for value in graph.initializers.values() if not value.is_graph_input()]  # not settable
    own = [value for value in own if all(use.node in members for use in value.uses())]
    readers = [(use.node, use.idx) for use in computed.uses() if use.node not in members]
    graph.outputs.clear()
    graph.remove(inside)
    for value in own:
        del graph.initializers[str(value.name)]
    computed.name = f"{RESULT}.judged"
    then_branch = ir.Graph([], [computed], nodes=inside, initializers=own, name=f"{RESULT}.then", opset_imports={})
    otherwise = _unjudged(graph.inputs[0], computed, f"{name}/otherwise")
    branch = ir.Node(
        "", "If", [condition],
        [ir.AttrGraph("then_branch", then_branch), ir.AttrGraph("else_branch", otherwise)], name=name,
    )  # fmt: skip
    out = branch.outputs[0]
    out.name, out.shape, out.type = RESULT, computed.shape, computed.type
    for node, index in readers:
        node.replace_input_with(index, out)
    graph.append(branch)
    graph.outputs.extend(out if value is computed else value for value in outputs.values())
    graph.sort()  # the branch must precede the nodes that read its result


def _unjudged(fed: ir.Value, like: ir.Value, name: str) -> ir.Graph:
    """Return a branch whose output is NaN for each row of `fed`, (batch,)."""
    assert like.dtype is not None
    tape, fill_with = ir.tape.Tape(), ir.tensor([float("nan")], dtype=like.dtype)
    rows = tape.op("Shape", [fed], {"start": 0, "end": 1}, name=f"{name}/Shape")
    out = tape.op("ConstantOfShape", [rows], {"value": fill_with}, name=name)
    rows.name, out.name, out.shape, out.type = f"{like.name}.rows", f"{like.name}.otherwise", like.shape, like.type
    return ir.Graph([], [out], nodes=tape.nodes, name=f"{like.name}.else", opset_imports={})


def needed(values: Iterable[ir.Value], *, stop: Collection[ir.Value] = ()) -> set[ir.Node]:
    """Return all nodes that `values` are computed from. The search ends at the values in `stop`."""
    found: set[ir.Node] = set()
    waiting = [value for value in values if value not in stop]
    while waiting:
        node = waiting.pop().producer()
        if node is None or node in found:
            continue
        found.add(node)
        waiting.extend(value for value in reads(node) if value not in stop)
    return found


def reads(node: ir.Node) -> Iterator[ir.Value]:
    """Yield the values that a node reads, also inside its branches, including values made there."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                yield from reads(inner)
