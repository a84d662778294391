"""Put the second lane under one `If`, so that only a call pays for it in which a verdict is due.

The branch holds nodes alone: it reads weights and states of the main lane from the graph around it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir


def lane_nodes(graph: ir.Graph, results: Sequence[ir.Value]) -> list[ir.Node]:
    """The nodes that nothing but `results` needs, in order."""
    shared = _needed([value for value in graph.outputs if value not in results], stop=results)
    lane = _needed(results, stop=()) - shared
    return [node for node in graph if node in lane]


def run_where_due(model: ir.Model, *, results: Mapping[str, float | int], kept: Sequence[str], predicate: str) -> None:
    """Compute some outputs in an `If`.

    Args:
        model: a graph whose outputs include all these names, and whose first input is (batch, tokens, hidden).
        results: the outputs, (batch,) or (batch, tokens), and what each is filled with where no verdict is due.
        kept: those of them that stay outputs of the graph.
        predicate: a bool (), which stops being an output.
    """
    graph = model.graph
    outputs = {str(value.name): value for value in graph.outputs}
    judged = [outputs[name] for name in results]
    lane = lane_nodes(graph, judged)
    readers = [[(use.node, use.idx) for use in value.uses() if use.node not in lane] for value in judged]
    before = list(graph.outputs)
    graph.outputs.clear()
    graph.remove(lane)
    for name, value in zip(results, judged, strict=True):
        value.name = f"{name}.judged"
    then_branch = ir.Graph([], judged, nodes=lane, name="sasa.lane", opset_imports={})
    otherwise = _not_judged(graph, dict(zip(results, judged, strict=True)), results)
    branch = ir.Node(
        "", "If", [outputs[predicate]],
        [ir.AttrGraph("then_branch", then_branch), ir.AttrGraph("else_branch", otherwise)],
        num_outputs=len(judged), name="/sasa/lane",
    )  # fmt: skip
    found = dict(zip(results, branch.outputs, strict=True))
    for (name, out), like, uses in zip(found.items(), judged, readers, strict=True):
        out.name, out.shape, out.type = name, like.shape, like.type
        for node, index in uses:
            node.replace_input_with(index, out)
    graph.append(branch)
    names = [name for name, value in outputs.items() if name != predicate and (name in kept or value not in judged)]
    graph.outputs.extend(found.get(name, outputs[name]) for name in names if outputs[name] in before)
    graph.sort()  # the branch belongs before whatever reads its results


def _not_judged(graph: ir.Graph, like: Mapping[str, ir.Value], fills: Mapping[str, float | int]) -> ir.Graph:
    """A branch that yields one fixed value for each place of the results."""
    nodes, outputs = [], []
    for name, value in like.items():
        assert value.shape is not None and value.dtype is not None
        end = ir.AttrInt64("end", len(value.shape))
        shape = ir.Node(
            "", "Shape", [graph.inputs[0]], [ir.AttrInt64("start", 0), end], name=f"/sasa/not_due/{name}/Shape"
        )
        content = ir.AttrTensor("value", ir.tensor([fills[name]], dtype=value.dtype))
        fill = ir.Node("", "ConstantOfShape", [shape.outputs[0]], [content], name=f"/sasa/not_due/{name}")
        shape.outputs[0].name = f"{name}.shape"
        out = fill.outputs[0]
        out.name, out.shape, out.type = f"{name}.not_due", value.shape, value.type
        nodes += [shape, fill]
        outputs.append(out)
    return ir.Graph([], outputs, nodes=nodes, name="sasa.not_due", opset_imports={})


def _needed(values: Sequence[ir.Value], *, stop: Sequence[ir.Value]) -> set[ir.Node]:
    """All nodes that `values` are computed from; what lies before those of `stop` does not count."""
    found: set[ir.Node] = set()
    waiting = [value for value in values if value not in stop]
    while waiting:
        node = waiting.pop().producer()
        if node is None or node in found:
            continue
        found.add(node)
        waiting.extend(value for value in node.inputs if value is not None and value not in stop)
    return found
