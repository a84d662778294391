"""Removes a check for NaN from attention where it is not needed."""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import RewritePass, pattern


def trust_finite_masks(model: ir.Model) -> None:
    """Remove the check for rows that may attend to nothing, where the mask adds a finite float32.

    Softmax then gives no NaN. Below opset 23, each block has an IsNaN, for which WebGPU has no kernel. In float16, the
    sum of score and mask can overflow, and the check stays.
    """
    RewritePass([pattern.RewriteRule(_looking, _plain, _is_finite, remove_nodes=False)])(model)


def _looking(op: Any, scores: Any, allowed: Any, zero: Any, low: Any, empty: Any) -> Any:
    masked = op.Add(scores, op.Where(allowed, zero, low))
    weights = op.Softmax(masked, _outputs=["weights"])
    return op.Where(op.IsNaN(weights), empty, weights)


def _plain(op: Any, weights: ir.Value, **others: Any) -> Any:
    return op.Identity(weights)


def _is_finite(context: Any, zero: ir.Value, low: ir.Value, **others: Any) -> bool:
    held = [value.const_value for value in (zero, low)]
    return all(it is not None and it.dtype == ir.DataType.FLOAT and np.isfinite(it.numpy()).all() for it in held)
