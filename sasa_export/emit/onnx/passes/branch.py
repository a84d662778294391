"""Put the second lane under one `If`, so that only a prompt pays for it.

The branch holds nodes alone: it reads weights and states of the main lane from the graph around it.
"""

from __future__ import annotations

import onnx_ir as ir


def lane_nodes(graph: ir.Graph, result: ir.Value) -> list[ir.Node]:
    """The nodes that nothing but `result` needs, in order."""
    shared = _needed([value for value in graph.outputs if value is not result], stop=result)
    lane = _needed([result], stop=None) - shared
    return [node for node in graph if node in lane]


def run_for_prompts_only(model: ir.Model, *, result: str, predicate: str) -> None:
    """Compute the output `result` (batch,) in an `If`; NaN where nothing is judged.

    Args:
        model: a graph whose outputs include both names; `predicate`, a bool (), stops being one.
    """
    graph = model.graph
    outputs = {value.name: value for value in graph.outputs}
    probability, is_prompt = outputs[result], outputs[predicate]
    lane = lane_nodes(graph, probability)
    readers = [(use.node, use.idx) for use in probability.uses()]
    before = list(graph.outputs)
    graph.outputs.clear()
    graph.remove(lane)
    probability.name = f"{result}.judged"
    then_branch = ir.Graph([], [probability], nodes=lane, name="sasa.lane", opset_imports={})
    otherwise = _not_judged(graph, probability, result)
    branch = ir.Node(
        "", "If", [is_prompt],
        [ir.AttrGraph("then_branch", then_branch), ir.AttrGraph("else_branch", otherwise)],
        num_outputs=1, name="/sasa/lane",
    )  # fmt: skip
    out = branch.outputs[0]
    out.name, out.shape, out.type = result, probability.shape, probability.type
    for node, index in readers:
        node.replace_input_with(index, out)
    graph.append(branch)
    graph.outputs.extend(out if value is probability else value for value in before if value is not is_prompt)
    graph.sort()  # the branch belongs before whatever reads its result


def _not_judged(graph: ir.Graph, like: ir.Value, name: str) -> ir.Graph:
    """A branch that yields one NaN for each row."""
    batch = graph.inputs[0]
    shape = ir.Node("", "Shape", [batch], [ir.AttrInt64("start", 0), ir.AttrInt64("end", 1)], name="/sasa/rows")
    nan = ir.tensor([float("nan")], dtype=ir.DataType.FLOAT)
    fill = ir.Node("", "ConstantOfShape", [shape.outputs[0]], [ir.AttrTensor("value", nan)], name="/sasa/not_judged")
    shape.outputs[0].name = f"{name}.rows"
    out = fill.outputs[0]
    out.name, out.shape, out.type = f"{name}.not_judged", like.shape, like.type
    return ir.Graph([], [out], nodes=[shape, fill], name="sasa.not_judged", opset_imports={})


def _needed(values: list[ir.Value], *, stop: ir.Value | None) -> set[ir.Node]:
    """All nodes that `values` are computed from; what lies before `stop` does not count."""
    found: set[ir.Node] = set()
    waiting = [value for value in values if value is not stop]
    while waiting:
        node = waiting.pop().producer()
        if node is None or node in found:
            continue
        found.add(node)
        waiting.extend(value for value in node.inputs if value is not None and value is not stop)
    return found
