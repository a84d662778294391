"""Weight-only quantization: of matrix products by onnxruntime's own quantizer, of embeddings by ours."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

BITS = {"int8": 8, "int4": 4}
BLOCKS = {8: 64, 4: 32}  # weights of a matrix product that share one scale, by bits
FINE = 32  # the same of embeddings and of the head, whose rounding no later block evens out
HEAD = "/decoder/lm_head/"
ACCURACY = 4  # the accuracy_level: states are rounded to 8 bits for each product, for which CPUs have fast code
MATRIX = 2  # axes
DOMAIN = "com.microsoft"  # of MatMulNBits, which onnxruntime documents in docs/ContribOperators.md


def quantize(model: ir.Model, dtype: str) -> None:
    """Put the weights of each MatMul into blocks of 8 or 4 bits, in place, and let its product be one of integers.

    Of the gate, only the second lane is quantized, whose weights are the decoder's; the comparison of embeddings
    with the template's stays exact. Run it while both lanes lie in one graph, so that they go on sharing weights.
    Memory holds one weight's copies at a time: onnxruntime's own pass over a model would copy the whole graph.
    """
    graph, bits = model.graph, BITS[dtype]
    packed: dict[ir.Value, list[ir.Value]] = {}
    for node in list(graph):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or not _is_matrix(weight) or _is_gate(str(node.name)):
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


def halve_kernels(model: ir.Model) -> None:
    """Store the kernels of convolutions, such as those of patches, in float16, in place."""
    graph = model.graph
    for node in [node for node in graph if node.op_type == "Conv"]:
        weight = node.inputs[1]
        assert weight is not None and weight.const_value is not None
        half = ir.tensor(weight.const_value.numpy().astype(np.float16), name=f"{weight.name}_half")
        tape = ir.tape.Tape()
        node.replace_input_with(1, tape.op("Cast", [tape.initializer(half)], {"to": ir.DataType.FLOAT}))
        graph.insert_before(node, tape.nodes)
        graph.register_initializer(tape.initializers[0])


@dataclass(frozen=True)
class Table:
    """A table of embeddings in 8 bits: rows (vocabulary, blocks, block), int8, each block with a scale in float32."""

    rows: NDArray[np.int8]
    scales: NDArray[np.float32]  # (vocabulary, blocks, 1)

    @classmethod
    def round(cls, embedding: nn.Module) -> Table:
        """Round a module's weight (vocabulary, hidden) for good, to what `store` makes of it to the bit: the gate knows
        the template's tokens by their embeddings. A head that shared the weight keeps it as it was."""
        weight: NDArray[np.float32] = embedding.get_parameter("weight").detach().numpy()
        hidden = weight.shape[1]
        blocks = weight.reshape(len(weight), -1, FINE if hidden % FINE == 0 else hidden)
        scales = np.maximum(np.abs(blocks).max(-1, keepdims=True) / np.float32(127), np.finfo(np.float32).tiny)
        table = cls(np.rint(blocks / scales).astype(np.int8), scales)
        rounded = torch.from_numpy((table.rows.astype(np.float32) * table.scales).reshape(weight.shape))
        embedding.register_parameter("weight", nn.Parameter(rounded, requires_grad=False))
        return table

    def store(self, model: ir.Model) -> None:
        """Put the table in the place of the weight that a Gather of the graph looks up, in place."""
        nodes = (node for node in model.graph if node.op_type == "Gather")
        node, weight = next((node, weight) for node in nodes if (weight := node.inputs[0]) and _is_matrix(weight))
        assert weight.name is not None
        ids, tape = node.inputs[1], ir.tape.Tape()
        rows = tape.initializer(ir.tensor(self.rows, name="embedding_Q8"))
        scales = tape.initializer(ir.tensor(self.scales, name="embedding_scales"))
        flat = tape.initializer(ir.tensor([0, 0, -1], name="embedding_shape"))
        found = tape.op("Cast", [tape.op("Gather", [rows, ids])], {"to": ir.DataType.FLOAT})
        scaled = tape.op("Mul", [found, tape.op("Gather", [scales, ids])])  # (batch, tokens, blocks, block)
        new = tape.op("Reshape", [scaled, flat])  # (batch, tokens, hidden)
        for value in tape.initializers:
            model.graph.register_initializer(value)
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], tape.nodes, node.outputs, [new])
        del model.graph.initializers[weight.name]


def _is_matrix(value: ir.Value) -> bool:
    return value.is_initializer() and value.const_value is not None and len(value.const_value.shape) == MATRIX


def _is_gate(name: str) -> bool:
    return name.startswith("/sasa/") and not name.startswith("/sasa/lane/")


def _packed(weight: ir.TensorProtocol, name: str, bits: int, block: int) -> list[ir.Value]:
    """The initializers for a weight (rows, columns): its blocks (columns, blocks, block * bits / 8), uint8, and their
    scales (columns, blocks)."""
    quiet = logging.NullHandler()
    logging.root.addHandler(quiet)  # or the import would set up the logging of the whole process
    from onnxruntime.quantization import matmul_nbits_quantizer as library

    logging.root.removeHandler(quiet)
    config = library.DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=True, bits=bits)
    quantizer = library.DefaultWeightOnlyQuantizer(config)
    blocks, scales, _ = quantizer.qbits_block_quant(np.ascontiguousarray(weight.numpy()))
    tensors = (ir.tensor(blocks, name=f"{name}_Q{bits}"), ir.tensor(scales, name=f"{name}_scales"))
    return [ir.val(tensor.name, const_value=tensor) for tensor in tensors]
