"""Node names that follow the module path, so that the rewritten graph can be read in a viewer.

`/decoder/layers.13/self_attn/q_proj/MatMul` in the main lane, `/sasa/lane/layers.14/...` in the second lane,
`/sasa/probe/...` and `/sasa/gate/...` around it.
"""

import ast
from collections import Counter
from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.passes import common

SCOPES = "pkg.torch.onnx.name_scopes"
GUARD = "model.sasa"  # the module that is the gate
WRAPPERS = ("", "inner")  # modules around a tower that say nothing of it


def name_decoder(model: ir.Model, modules: dict[str, str]) -> None:
    """Name the nodes of a decoder; `modules` are the paths of its `blocks`, `norm` and `head` in it."""
    _name(model, lambda scopes: _place(scopes, modules))


def name_tower(model: ir.Model, prefix: str) -> None:
    """Name the nodes of a graph of one part of the model, by its modules' own paths."""
    _name(model, lambda scopes: "/".join([prefix, *(part for part in scopes[-1].split(".") if part not in WRAPPERS)]))


def _name(model: ir.Model, place: Callable[[list[str]], str]) -> None:
    """Name each node by the modules that it was traced in, from the outermost on, and remove what the exporter noted on
    it: source lines and stack traces of this machine."""
    graph, seen = model.graph, Counter[str]()
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))[:-1]  # the last one is the operation itself
        name = f"{place(scopes or [''])}/{node.op_type}"
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name] - 1}"
    common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    model.producer_name, model.producer_version = "sasa-export", None
    outputs = (value for node in graph.all_nodes() for value in node.outputs)
    for value in (*graph.inputs, *graph.initializers.values(), *outputs):
        value.metadata_props.clear()


def _place(scopes: list[str], modules: dict[str, str]) -> str:
    """Where a node belongs: a block of either lane, or what the gate does around them."""
    path = scopes[-1]
    in_gate = GUARD in scopes
    for role, name in (("blocks", "layers"), ("norm", "norm"), ("head", "lm_head")):
        base = modules[role]
        if path == base or path.startswith(base + "."):
            rest = path.removeprefix(base).strip(".")
            index, _, inner = rest.partition(".") if role == "blocks" else ("", "", rest)
            parts = [f"{name}.{index}" if index else name, *inner.split(".")]
            return ("/sasa/lane/" if in_gate else "/decoder/") + "/".join(part for part in parts if part)
    if path == f"{GUARD}.probe":
        return "/sasa/probe"
    if path == GUARD:
        return "/sasa/gate"
    return "/sasa/lane/context" if in_gate else "/decoder"
