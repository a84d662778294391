"""Names nodes by their module path, to make a graph readable in a viewer. Examples:
`/decoder/layers/13/self_attn/q_proj/MatMul`, `/sasa/probe/...` and `/sasa/gate/...`."""

import ast
from collections import Counter

import onnx_ir as ir
from onnx_ir.passes import common

SCOPES = "pkg.torch.onnx.name_scopes"


def name_nodes(model: ir.Model, names: dict[str, str]) -> None:
    """Name each node by the module that it was traced in. Remove the exporter's notes, such as source lines and stack
    traces of this machine.

    `names` maps paths of modules to prefixes of their nodes' names; that of the longest path counts. It has "".
    """
    graph, seen = model.graph, Counter[str]()
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))[:-1]  # the last one is the operation itself
        name = f"{_prefix(scopes[-1] if scopes else '', names)}/{node.op_type}"
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name] - 1}"
    common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    model.producer_name, model.producer_version = "sasa-export", None
    outputs = (value for node in graph.all_nodes() for value in node.outputs)
    for value in (*graph.inputs, *graph.initializers.values(), *outputs):
        value.metadata_props.clear()


def _prefix(path: str, names: dict[str, str]) -> str:
    parts = [part for part in path.split(".") if part]
    length = next(length for length in range(len(parts), -1, -1) if ".".join(parts[:length]) in names)
    return "/".join([names[".".join(parts[:length])], *parts[length:]])
