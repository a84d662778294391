"""Weight-only quantization of matrix products, by onnxruntime's own quantizer."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import onnx_ir as ir

BITS = {"int8": 8, "int4": 4}
BLOCK = 32  # weights that share one scale
ACCURACY = 4  # the accuracy_level: states are rounded to 8 bits for each product, for which CPUs have fast code
MATRIX = 2  # axes
DOMAIN = "com.microsoft"  # of MatMulNBits, which onnxruntime documents in docs/ContribOperators.md


def quantize(model: ir.Model, dtype: str) -> None:
    """Put the weights of each MatMul into blocks of 8 or 4 bits, in place, and let its product be one of integers.

    Of the gate, only the second lane is quantized, whose weights are the decoder's; the comparison of embeddings
    with the template's stays exact. Run it while both lanes lie in one graph, so that they go on sharing weights.
    Memory holds one weight's copies at a time: onnxruntime's own pass over a model would copy the whole graph.
    """
    graph = model.graph
    pack = _packer(BITS[dtype])
    packed: dict[ir.Value, list[ir.Value]] = {}
    for node in list(graph):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or not _is_matrix(weight) or _is_gate(str(node.name)):
            continue
        if weight not in packed:
            packed[weight] = pack(weight)
            for value in packed[weight]:
                graph.register_initializer(value)
        new = _product(node, packed[weight], BITS[dtype])
        graph.insert_after(node, new)
        node.outputs[0].replace_all_uses_with(new.outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)
    if packed:
        model.opset_imports[DOMAIN] = 1
    for weight in packed:
        if weight.name is not None and not weight.uses():
            del graph.initializers[weight.name]


def _is_matrix(value: ir.Value) -> bool:
    return value.is_initializer() and value.const_value is not None and len(value.const_value.shape) == MATRIX


def _is_gate(name: str) -> bool:
    return name.startswith("/sasa/") and not name.startswith("/sasa/lane/")


def _product(node: ir.Node, packed: list[ir.Value], bits: int) -> ir.Node:
    """The node that takes the place of a MatMul, whose weight (rows, columns) was `packed`."""
    assert node.inputs[1] is not None and node.inputs[1].const_value is not None
    rows, columns = node.inputs[1].const_value.shape.numpy()
    attributes = {"K": rows, "N": columns, "bits": bits, "block_size": BLOCK, "accuracy_level": ACCURACY}
    before = node.outputs[0]
    new = ir.node(
        "MatMulNBits", [node.inputs[0], *packed], attributes=attributes, domain=DOMAIN, name=node.name, num_outputs=1
    )
    new.outputs[0].name, new.outputs[0].shape, new.outputs[0].type = before.name, before.shape, before.type
    return new


def _packer(bits: int) -> Any:
    """A function from a weight (rows, columns) to the initializers of its blocks and of their scales.

    Blocks are (columns, blocks, BLOCK * bits / 8), uint8, and scales (columns, blocks).
    """
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    from onnxruntime.quantization import matmul_nbits_quantizer as library

    root.handlers[:] = handlers  # importing it sets up logging for the whole process
    root.setLevel(level)
    config = library.DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, bits=bits)
    quantizer = library.DefaultWeightOnlyQuantizer(config)

    def pack(weight: ir.Value) -> list[ir.Value]:
        assert weight.const_value is not None
        blocks, scales, _ = quantizer.qbits_block_quant(np.ascontiguousarray(weight.const_value.numpy()))
        tensors = (ir.tensor(blocks, name=f"{weight.name}_Q{bits}"), ir.tensor(scales, name=f"{weight.name}_scales"))
        return [
            ir.Value(name=t.name, shape=ir.Shape(t.shape.numpy()), type=ir.TensorType(t.dtype), const_value=t)
            for t in tensors
        ]

    return pack
