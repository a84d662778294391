"""Weight-only quantization: of matrix products by onnxruntime's own quantizer, of embeddings by ours."""

from __future__ import annotations

import logging

import numpy as np
import onnx_ir as ir
import torch
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


class Table(nn.Module):
    """A table of embeddings in 8 bits, each block of a row with a scale in float32.

    It rounds an embedding's weight (vocabulary, hidden) for good, to what it gives itself to the bit: the gate knows
    the template's tokens by their embeddings. A head that shared the weight keeps it as it was.
    """

    rows: torch.Tensor  # (vocabulary, hidden), int8
    scales: torch.Tensor  # (vocabulary, blocks), float32

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        weight = embedding.get_parameter("weight").detach()
        hidden = weight.shape[1]
        self.block = FINE if hidden % FINE == 0 else hidden
        blocks = weight.unflatten(1, (-1, self.block))  # (vocabulary, blocks, block)
        scales = (blocks.abs().amax(-1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        self.register_buffer("scales", scales)
        self.register_buffer("rows", (blocks / scales[..., None]).round().to(torch.int8).flatten(1))
        rounded = self(torch.arange(len(weight)))
        embedding.register_parameter("weight", nn.Parameter(rounded, requires_grad=False))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (batch, tokens) -> embeddings (batch, tokens, hidden)."""
        rows, scales = (nn.functional.embedding(ids, table) for table in (self.rows, self.scales))
        return rows.float() * scales.repeat_interleave(self.block, -1)


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
