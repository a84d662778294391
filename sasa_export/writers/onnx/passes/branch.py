"""Put part of a graph under one `If`, so that only a call pays for it that needs it.

The branch holds nodes alone: it reads weights and states of the main lane from the graph around it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir


def lane_nodes(graph: ir.Graph, results: Sequence[ir.Value]) -> list[ir.Node]:
    """The nodes that nothing but `results` needs, in order."""
    return _only_for(graph, results, graph.outputs)


def run_where(
    model: ir.Model, name: str, *, results: Mapping[str, float | str], kept: Sequence[str], predicate: str
) -> None:
    """Compute some outputs in an `If`.

    Args:
        model: a graph whose outputs include all these names, and whose first input is (batch, tokens, hidden).
        name: of the `If`.
        results: the outputs, (batch,) or (batch, tokens), and what each is elsewhere: a fill, or the name of
            another output, which stops being one.
        kept: those of them that stay outputs of the graph.
        predicate: a bool (), which stops being an output.
    """
    graph = model.graph
    outputs = {str(value.name): value for value in graph.outputs}
    computed = [outputs[result] for result in results]
    others = {result: outputs[other] for result, other in results.items() if isinstance(other, str)}
    inside = _only_for(graph, computed, list(outputs.values()))
    members = set(inside)
    readers = [[(use.node, use.idx) for use in value.uses() if use.node not in members] for value in computed]
    graph.outputs.clear()
    graph.remove(inside)
    label = name.strip("/").replace("/", ".")
    for result, value in zip(results, computed, strict=True):
        value.name = f"{label}.{result}"
    then_branch = ir.Graph([], computed, nodes=inside, name=label, opset_imports={})
    otherwise = _otherwise(graph.inputs[0], name, dict(zip(results, computed, strict=True)), results, others)
    branch = ir.Node(
        "", "If", [outputs[predicate]],
        [ir.AttrGraph("then_branch", then_branch), ir.AttrGraph("else_branch", otherwise)],
        num_outputs=len(computed), name=name,
    )  # fmt: skip
    found = dict(zip(results, branch.outputs, strict=True))
    for (result, out), like, uses in zip(found.items(), computed, readers, strict=True):
        out.name, out.shape, out.type = result, like.shape, like.type
        for node, index in uses:
            node.replace_input_with(index, out)
    graph.append(branch)
    gone = {predicate, *(str(other) for other in results.values() if isinstance(other, str))}
    gone |= {result for result in results if result not in kept}
    graph.outputs.extend(found.get(one, value) for one, value in outputs.items() if one not in gone)
    graph.sort()  # the branch belongs before whatever reads its results


def _otherwise(
    fed: ir.Value,
    name: str,
    like: Mapping[str, ir.Value],
    fills: Mapping[str, float | str],
    others: Mapping[str, ir.Value],
) -> ir.Graph:
    """A branch that yields for each result the other value, or one fill in each of its places."""
    nodes, outputs = [], []
    label = name.strip("/").replace("/", ".")
    for result, value in like.items():
        assert value.shape is not None and value.dtype is not None
        if result in others:
            fill = ir.Node("", "Identity", [others[result]], name=f"{name}/otherwise/{result}")
            nodes.append(fill)
        else:
            places = [ir.AttrInt64("start", 0), ir.AttrInt64("end", len(value.shape))]
            shape = ir.Node("", "Shape", [fed], places, name=f"{name}/otherwise/{result}/Shape")
            content = ir.AttrTensor("value", ir.tensor([fills[result]], dtype=value.dtype))
            fill = ir.Node("", "ConstantOfShape", [shape.outputs[0]], [content], name=f"{name}/otherwise/{result}")
            shape.outputs[0].name = f"{label}.{result}.shape"
            nodes += [shape, fill]
        out = fill.outputs[0]
        out.name, out.shape, out.type = f"{label}.{result}.otherwise", value.shape, value.type
        outputs.append(out)
    return ir.Graph([], outputs, nodes=nodes, name=f"{label}.otherwise", opset_imports={})


def _only_for(graph: ir.Graph, results: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> list[ir.Node]:
    """The nodes that of all these outputs `results` alone need, in order."""
    shared = _needed([value for value in outputs if value not in results], stop=results)
    only = _needed(results, stop=()) - shared
    return [node for node in graph if node in only]


def _needed(values: Sequence[ir.Value], *, stop: Sequence[ir.Value]) -> set[ir.Node]:
    """All nodes that `values` are computed from; what lies before those of `stop` does not count."""
    found: set[ir.Node] = set()
    waiting = [value for value in values if value not in stop]
    while waiting:
        node = waiting.pop().producer()
        if node is None or node in found:
            continue
        found.add(node)
        waiting.extend(value for value in _reads(node) if value not in stop)
    return found


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, within its branches too; values made inside a branch are among them."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                yield from _reads(inner)
