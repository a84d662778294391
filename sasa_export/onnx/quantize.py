"""Weight-only quantization: onnxruntime's quantizer for matrix products, and an own one for embeddings."""

from __future__ import annotations

import logging

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

BITS = {"int8": 8, "int4": 4}
BLOCKS = {8: 64, 4: 32}  # bits -> number of a matrix product's weights that share one scale
FINE = 32  # the same for embeddings and the head, whose rounding no later block evens out
HEAD = "/decoder/lm_head/"
ACCURACY = 4  # accuracy_level: each product rounds states to 8 bits, which is fast on CPUs
MATRIX = 2  # axes
DOMAIN = "com.microsoft"  # of MatMulNBits, which onnxruntime documents in docs/ContribOperators.md


def quantize(model: ir.Model, dtype: str) -> None:
    """Quantize the weights of each MatMul to blocks of 8 or 4 bits, in place, and multiply integers. Other types change
    nothing.

    Memory holds the copies of one weight at a time. onnxruntime's own pass would copy the whole graph.
    """
    graph, bits = model.graph, BITS.get(dtype)
    if bits is None:
        return
    packed: dict[ir.Value, list[ir.Value]] = {}
    for node in list(graph):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or not _is_matrix(weight):
            continue
        assert weight.const_value is not None
        block = FINE if str(node.name).startswith(HEAD) else BLOCKS[bits]
        if weight not in packed:
            packed[weight] = _packed(weight.const_value, str(weight.name), bits, block)
            for value in packed[weight]:
                graph.register_initializer(value)
        rows, columns = weight.const_value.shape.numpy()
        attributes = {"K": rows, "N": columns, "bits": bits, "block_size": block, "accuracy_level": ACCURACY}
        given = [node.inputs[0], *packed[weight]]
        new = ir.node("MatMulNBits", given, attributes=attributes, domain=DOMAIN, name=node.name)
        ir.convenience.replace_nodes_and_values(graph, node, [node], [new], node.outputs, new.outputs)
    if packed:
        model.opset_imports[DOMAIN] = 1
    common.RemoveUnusedNodesPass()(model)


def round_table(model: ir.Model) -> None:
    """Quantize the embedding table (vocabulary, hidden), which a Gather reads, to 8 bits, in place. The result is
    (vocabulary, blocks, block), int8. Each block has a float32 scale."""
    nodes = (node for node in model.graph if node.op_type == "Gather")
    node, weight = next((node, weight) for node in nodes if (weight := node.inputs[0]) and _is_matrix(weight))
    assert weight.const_value is not None and weight.name is not None
    table = weight.const_value.numpy()
    blocks = table.reshape(len(table), -1, FINE if table.shape[1] % FINE == 0 else table.shape[1])
    scales = np.maximum(np.abs(blocks).max(-1, keepdims=True) / np.float32(127), np.finfo(np.float32).tiny)
    tape, ids = ir.tape.Tape(), node.inputs[1]
    rows = tape.initializer(ir.tensor(np.rint(blocks / scales).astype(np.int8), name="embedding_Q8"))
    scale = tape.initializer(ir.tensor(scales, name="embedding_scales"))
    flat = tape.initializer(ir.tensor([0, 0, -1], name="embedding_shape"))
    found = tape.op("Cast", [tape.op("Gather", [rows, ids])], {"to": ir.DataType.FLOAT})
    scaled = tape.op("Mul", [found, tape.op("Gather", [scale, ids])])  # (batch, tokens, blocks, block)
    new = tape.op("Reshape", [scaled, flat])  # (batch, tokens, hidden)
    for value in tape.initializers:
        model.graph.register_initializer(value)
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], tape.nodes, node.outputs, [new])
    del model.graph.initializers[weight.name]


def _is_matrix(value: ir.Value) -> bool:
    return value.is_initializer() and value.const_value is not None and len(value.const_value.shape) == MATRIX


def _packed(weight: ir.TensorProtocol, name: str, bits: int, block: int) -> list[ir.Value]:
    """Return the initializers for a weight (rows, columns): its blocks (columns, blocks, block * bits / 8), uint8, and
    their scales (columns, blocks)."""
    quiet = logging.NullHandler()
    logging.root.addHandler(quiet)  # keeps the import from configuring the process's logging
    from onnxruntime.quantization import matmul_nbits_quantizer as library

    logging.root.removeHandler(quiet)
    config = library.DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=True, bits=bits)
    quantizer = library.DefaultWeightOnlyQuantizer(config)
    blocks, scales, _ = quantizer.qbits_block_quant(np.ascontiguousarray(weight.numpy()))
    tensors = (ir.tensor(blocks, name=f"{name}_Q{bits}"), ir.tensor(scales, name=f"{name}_scales"))
    return [ir.val(tensor.name, const_value=tensor) for tensor in tensors]
