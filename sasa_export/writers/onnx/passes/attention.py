"""Attention with nothing in it that runtimes need not do."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


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
