"""Put part of a graph under one `If`, so that only a call pays for it that needs it.

It reads what it shares with the graph around it from there, weights as states. What it alone reads lies in it: tools
that rewrite graphs drop an initializer that no node beside it reads.
"""

from collections.abc import Collection, Iterable, Iterator

import onnx_ir as ir


def run_where(model: ir.Model, name: str, *, result: str, fill: float, predicate: str) -> None:
    """Compute an output in an `If`; elsewhere it is `fill`.

    Args:
        model: a graph whose first input is (batch, tokens, hidden).
        name: of the `If`.
        result: the output's name; it is (batch,).
        predicate: another output, a bool (), which stops being one.
    """
    graph = model.graph
    outputs = {str(value.name): value for value in graph.outputs}
    computed, condition = outputs[result], outputs.pop(predicate)
    others = [value for value in graph.outputs if value is not computed]
    members = needed([computed]) - needed(others, stop={computed})
    inside = [node for node in graph if node in members]
    own = [value for value in graph.initializers.values() if not value.is_graph_input()]  # that no runtime sets
    own = [value for value in own if all(use.node in members for use in value.uses())]
    readers = [(use.node, use.idx) for use in computed.uses() if use.node not in members]
    graph.outputs.clear()
    graph.remove(inside)
    for value in own:
        del graph.initializers[str(value.name)]
    computed.name = f"{result}.judged"
    then_branch = ir.Graph([], [computed], nodes=inside, initializers=own, name=f"{result}.then", opset_imports={})
    otherwise = _filled(graph.inputs[0], computed, f"{name}/otherwise", fill)
    branch = ir.Node(
        "", "If", [condition],
        [ir.AttrGraph("then_branch", then_branch), ir.AttrGraph("else_branch", otherwise)], name=name,
    )  # fmt: skip
    out = branch.outputs[0]
    out.name, out.shape, out.type = result, computed.shape, computed.type
    for node, index in readers:
        node.replace_input_with(index, out)
    graph.append(branch)
    graph.outputs.extend(out if value is computed else value for value in outputs.values())
    graph.sort()  # the branch belongs before whatever reads its result


def _filled(fed: ir.Value, like: ir.Value, name: str, fill: float) -> ir.Graph:
    """A branch that yields `fill` for each row of `fed`, (batch,)."""
    assert like.dtype is not None
    shape = ir.Node("", "Shape", [fed], [ir.AttrInt64("start", 0), ir.AttrInt64("end", 1)], name=f"{name}/Shape")
    content = ir.AttrTensor("value", ir.tensor([fill], dtype=like.dtype))
    filled = ir.Node("", "ConstantOfShape", [shape.outputs[0]], [content], name=name)
    shape.outputs[0].name = f"{like.name}.rows"
    out = filled.outputs[0]
    out.name, out.shape, out.type = f"{like.name}.otherwise", like.shape, like.type
    return ir.Graph([], [out], nodes=[shape, filled], name=f"{like.name}.else", opset_imports={})


def needed(values: Iterable[ir.Value], *, stop: Collection[ir.Value] = ()) -> set[ir.Node]:
    """All nodes that `values` are computed from; what lies before those of `stop` does not count."""
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
    """What a node reads, within its branches too; values made inside a branch are among them."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                yield from reads(inner)
