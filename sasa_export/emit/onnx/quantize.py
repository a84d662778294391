"""Weight-only quantization of matrix products, by onnxruntime's own quantizer."""

from __future__ import annotations

import logging
from typing import Any

import onnx_ir as ir

BITS = {"int8": 8, "int4": 4}
BLOCK = 32  # weights that share one scale


def quantize(model: ir.Model, dtype: str) -> ir.Model:
    """The same graph with the weights of each MatMul in blocks of 8 or 4 bits; all arithmetic stays as it was.

    Of the gate, only the second lane is quantized, whose weights are the decoder's; the comparison of embeddings
    with the template's stays exact. Run it while both lanes lie in one graph: equal quantized weights are merged
    afterwards as any others.
    """
    version = model.ir_version
    exact = [node.name for node in model.graph.all_nodes() if node.name and _is_gate(node.name)]
    quantizer = _quantizer()(
        ir.to_proto(model), bits=BITS[dtype], block_size=BLOCK, is_symmetric=True, nodes_to_exclude=exact
    )
    quantizer.process()
    quantized = ir.from_proto(quantizer.model.model)
    quantized.ir_version = version
    return quantized


def _is_gate(name: str) -> bool:
    return name.startswith("/sasa/") and not name.startswith("/sasa/lane/")


def _quantizer() -> Any:
    """onnxruntime's class; importing it sets up logging for the whole process, which is undone here."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    from onnxruntime.quantization import matmul_nbits_quantizer

    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger(matmul_nbits_quantizer.__name__).setLevel(logging.WARNING)
    return matmul_nbits_quantizer.MatMulNBitsQuantizer
