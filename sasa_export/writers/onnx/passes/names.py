"""Node names that follow the module path, so that the rewritten graph can be read in a viewer.

`/decoder/layers.13/self_attn/q_proj/MatMul` in the main lane, `/sasa/lane/layers.14/...` in the second lane,
`/sasa/projection/...`, `/sasa/turn/...`, `/sasa/probe/...`, `/sasa/gate/...`, `/sasa/ledger/...` around it.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Iterable

import onnx_ir as ir

from sasa_export.writers.onnx.passes.branch import lane_nodes

SCOPES = "pkg.torch.onnx.name_scopes"


def name_decoder(model: ir.Model, modules: dict[str, str], *, results: Iterable[str]) -> None:
    """Name the nodes of a decoder.

    Args:
        modules: paths of its `blocks`, `norm` and `head` inside the exported module.
        results: the outputs that the second lane computes; none where there is no lane.
    """
    graph = model.graph
    lane = lane_nodes(graph, [value for value in graph.outputs if value.name in set(results)])
    inside = set(lane)
    seen: Counter[str] = Counter()
    _name((node for node in graph if node not in inside), lambda node: _place(node, modules, "/decoder"), seen)
    blocks = [position for position, node in enumerate(lane) if "/layers." in _place(node, modules, "")]
    norm = [position for position, node in enumerate(lane) if _place(node, modules, "").startswith("/norm")]
    places: dict[ir.Node, str] = {}
    for position, node in enumerate(lane):
        own = _place(node, modules, "")
        if own.startswith("/sasa/"):
            places[node] = own
        elif own:
            places[node] = "/sasa/lane" + own
        elif norm and position > max(norm):
            places[node] = "/sasa/probe"
        else:
            places[node] = "/sasa/lane/context" if blocks and position < min(blocks) else "/sasa/lane"
    _name(lane, places.__getitem__, seen)


def name_tower(model: ir.Model, prefix: str) -> None:
    """Name the nodes of a graph of one part of the model, by its modules' own paths."""
    _name(
        model.graph,
        lambda node: prefix + "".join(f"/{part}" for part in _path(node).removeprefix("inner").split(".") if part),
        Counter(),
    )


def forget_origin(model: ir.Model) -> None:
    """Remove what the exporter notes on each node: source lines and stack traces of the machine it ran on."""
    model.metadata_props.clear()
    model.producer_name, model.producer_version = "sasa-export", None
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _scopes(node: ir.Node) -> list[str]:
    """The modules that an operation was traced in, from the outermost on."""
    scopes = node.metadata_props.get(SCOPES)
    return ast.literal_eval(scopes)[:-1] if scopes else []  # the last one is the operation itself


def _path(node: ir.Node) -> str:
    scopes = _scopes(node)
    return str(scopes[-1]) if scopes else ""


def _place(node: ir.Node, modules: dict[str, str], prefix: str) -> str:
    path = _path(node)
    if path == "lane":  # what it does before its first block
        return "/sasa/projection"
    if "lane" in _scopes(node):
        prefix = "/sasa/lane"
    if path in ("projection", "ledger", "turn", "gate"):
        return f"/sasa/{path}"
    for role, name in (("blocks", "layers"), ("norm", "norm"), ("head", "lm_head")):
        base = modules[role]
        if path != base and not path.startswith(base + "."):
            continue
        rest = path.removeprefix(base).strip(".")
        if not rest:
            return f"{prefix}/{name}"
        if role != "blocks":
            return f"{prefix}/{name}/" + rest.replace(".", "/")
        index, _, inner = rest.partition(".")
        return f"{prefix}/{name}.{index}" + (f"/{inner.replace('.', '/')}" if inner else "")
    return prefix


def _name(nodes: Iterable[ir.Node], place: Callable[[ir.Node], str], seen: Counter[str]) -> None:
    for node in nodes:
        name = f"{place(node)}/{node.op_type}"
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name] - 1}"
