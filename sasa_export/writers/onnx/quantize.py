"""Weight-only quantization of matrix products, by onnxruntime's own quantizer."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import onnx_ir as ir

BITS = {"int8": 8, "int4": 4}
BLOCK = 32  # weights that share one scale
MATRIX = 2  # axes


def quantize(model: ir.Model, dtype: str) -> None:
    """Put the weights of each MatMul into blocks of 8 or 4 bits, in place; all arithmetic stays as it was.

    Of the gate, only the second lane is quantized, whose weights are the decoder's; the comparison of embeddings
    with the template's stays exact. Run it while both lanes lie in one graph, so that they go on sharing weights.
    Memory holds one weight's copies at a time: onnxruntime's quantizer would copy a whole graph.
    """
    graph = model.graph
    packed: dict[ir.Value, ir.Node] = {}
    for node in list(graph):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or not _is_matrix(weight) or _is_gate(str(node.name)):
            continue
        if weight not in packed:
            packed[weight] = _packed(weight, dtype)
            for value in packed[weight].inputs[1:]:
                if value is not None:
                    graph.register_initializer(value)
        like = packed[weight]
        inputs = [node.inputs[0], *like.inputs[1:]]
        new = ir.Node(like.domain, like.op_type, inputs, like.attributes.values(), name=node.name)
        out, before = new.outputs[0], node.outputs[0]
        out.name, out.shape, out.type = before.name, before.shape, before.type
        graph.insert_after(node, new)
        before.replace_all_uses_with(out, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        model.opset_imports.setdefault(like.domain, 1)
    for weight in packed:
        if weight.name is not None and not weight.uses():
            del graph.initializers[weight.name]


def _is_matrix(value: ir.Value) -> bool:
    return value.is_initializer() and value.const_value is not None and len(value.const_value.shape) == MATRIX


def _is_gate(name: str) -> bool:
    return name.startswith("/sasa/") and not name.startswith("/sasa/lane/")


def _packed(weight: ir.Value, dtype: str) -> ir.Node:
    """What the quantizer makes of a product with this weight alone."""
    tensor = weight.const_value
    assert tensor is not None and weight.name is not None
    rows, columns = tensor.shape.numpy()
    kind = ir.TensorType(tensor.dtype)
    given = ir.Value(name="given", shape=ir.Shape(["rows", rows]), type=kind)
    held = ir.Value(name=weight.name, shape=ir.Shape([rows, columns]), type=kind, const_value=tensor)
    product = ir.Node("", "MatMul", [given, held], name="product")
    product.outputs[0].name, product.outputs[0].type = "found", kind
    product.outputs[0].shape = ir.Shape(["rows", columns])
    alone = ir.Graph(
        [given], product.outputs, nodes=[product], initializers=[held], name="alone", opset_imports={"": 21}
    )
    quantizer = _quantizer()(
        ir.to_proto(ir.Model(alone, ir_version=10)), bits=BITS[dtype], block_size=BLOCK, is_symmetric=True
    )
    quantizer.process()
    (node,) = ir.from_proto(quantizer.model.model).graph
    if node.op_type == "MatMul":
        raise AssertionError(f"onnxruntime's quantizer left {weight.name} as it was")
    return _detached(node)


def _detached(node: ir.Node) -> ir.Node:
    """The node with initializers that no graph owns; as parts of a protobuf they would keep all of it in memory."""
    values = [None if value is None else _copied(value) for value in node.inputs]
    return ir.Node(node.domain, node.op_type, values, node.attributes.values(), name=node.name)


def _copied(value: ir.Value) -> ir.Value:
    tensor = value.const_value
    if tensor is not None:
        tensor = ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=value.name)
    return ir.Value(name=value.name, shape=value.shape, type=value.type, const_value=tensor)


def _quantizer() -> Any:
    """onnxruntime's class; importing it sets up logging for the whole process, which is undone here."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    from onnxruntime.quantization import matmul_nbits_quantizer

    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger(matmul_nbits_quantizer.__name__).setLevel(logging.WARNING)
    return matmul_nbits_quantizer.MatMulNBitsQuantizer
