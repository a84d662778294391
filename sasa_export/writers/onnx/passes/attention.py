"""Attention with nothing in it that runtimes need not do."""

from __future__ import annotations

import numpy as np
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


def trust_finite_masks(model: ir.Model) -> None:
    """Take away the look for rows that may attend to nothing, where the mask adds a finite float32.

    Softmax then gives no NaN. Below opset 23 each block had an IsNaN, for which WebGPU has no kernel. In float16 a
    score can carry the sum out of range.
    """
    for node in model.graph.all_nodes():
        if node.op_type == "Where" and _looks_for_empty_rows(node):
            weights = node.inputs[2]
            assert weights is not None
            node.outputs[0].replace_all_uses_with(weights)


def _looks_for_empty_rows(node: ir.Node) -> bool:
    """Is this Where(IsNaN(p), 0, p), with p = Softmax(scores + Where(allowed, 0, a finite float32))?"""
    looked, _, weights = node.inputs
    softmax, added = _made_by(weights, "Softmax"), None
    if softmax is None or (look := _made_by(looked, "IsNaN")) is None or look.inputs[0] is not weights:
        return False
    if (total := _made_by(softmax.inputs[0], "Add")) is not None:
        added = _made_by(total.inputs[1], "Where")
    return added is not None and all(_finite(value) for value in added.inputs[1:])


def _made_by(value: ir.Value | None, operation: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == operation else None


def _finite(value: ir.Value | None) -> bool:
    held = value.const_value if value is not None else None
    return held is not None and held.dtype == ir.DataType.FLOAT and bool(np.isfinite(held.numpy()).all())
