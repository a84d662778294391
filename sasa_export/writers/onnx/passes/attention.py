"""Grouped-query attention without copies: the Attention operator shares key-value heads itself."""

from __future__ import annotations

import onnx_ir as ir


def share_key_value_heads(model: ir.Model) -> None:
    """Let each Attention read keys and values before they are repeated for the heads of a group."""
    for node in model.graph.all_nodes():
        if node.op_type != "Attention":
            continue
        for position in (1, 2):
            source = _before_repeat(node.inputs[position])
            if source is not None:
                node.replace_input_with(position, source)


def _before_repeat(value: ir.Value | None) -> ir.Value | None:
    """What Unsqueeze(2) -> Expand -> Reshape repeats along its heads, (batch, heads, tokens, size), or None."""
    chain = []
    for operation in ("Reshape", "Expand", "Unsqueeze"):
        node = value.producer() if value is not None else None
        if node is None or node.op_type != operation:
            return None
        chain.append(node)
        value = node.inputs[0]
    reshaped, expanded = chain[0].outputs[0].shape, chain[1].outputs[0].shape
    if value is None or value.shape is None or reshaped is None or expanded is None:
        return None
    grouped = len(expanded) == 5 and expanded[1] == value.shape[1] and len(reshaped) == 4
    whole = isinstance(expanded[1], int) and isinstance(expanded[2], int) and isinstance(reshaped[1], int)
    if not grouped or not whole or reshaped[1] != expanded[1] * expanded[2]:
        return None
    return value
