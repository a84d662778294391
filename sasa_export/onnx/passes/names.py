"""Names nodes by their module path, to make a graph readable in a viewer. Examples:
`/decoder/layers.13/self_attn/q_proj/MatMul`, `/sasa/probe/...` and `/sasa/gate/...`."""

import ast
from collections import Counter
from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.passes import common

SCOPES = "pkg.torch.onnx.name_scopes"
Place = Callable[[str], str]  # path of a node's module -> prefix of the node's name
WRAPPERS = ("", "inner")  # modules around a tower, left out of names


def in_decoder(modules: dict[str, str]) -> Place:
    """Return the rule for nodes of a decoder. `modules` holds the paths of its `blocks`, `norm` and `head`."""
    return lambda path: _place(path, modules)


def in_tower(prefix: str) -> Place:
    """Return the rule for nodes of a graph of one part of the model, by its modules' own paths."""
    return lambda path: "/".join([prefix, *(part for part in path.split(".") if part not in WRAPPERS)])


def in_guard(path: str) -> str:
    """Return the prefix for a node of the gate's graph."""
    return "/sasa/probe" if path == "sasa.probe" else "/sasa/gate"


def name_nodes(model: ir.Model, place: Place) -> None:
    """Name each node by the module that it was traced in. Remove the exporter's notes, such as source lines and stack
    traces of this machine."""
    graph, seen = model.graph, Counter[str]()
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))[:-1]  # the last one is the operation itself
        name = f"{place(scopes[-1] if scopes else '')}/{node.op_type}"
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name] - 1}"
    common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    model.producer_name, model.producer_version = "sasa-export", None
    outputs = (value for node in graph.all_nodes() for value in node.outputs)
    for value in (*graph.inputs, *graph.initializers.values(), *outputs):
        value.metadata_props.clear()


def _place(path: str, modules: dict[str, str]) -> str:
    for role, name in (("blocks", "layers"), ("norm", "norm"), ("head", "lm_head")):
        base = modules[role]
        if path == base or path.startswith(base + "."):
            rest = path.removeprefix(base).strip(".")
            index, _, inner = rest.partition(".") if role == "blocks" else ("", "", rest)
            parts = [f"{name}.{index}" if index else name, *inner.split(".")]
            return "/decoder/" + "/".join(part for part in parts if part)
    return "/decoder"
