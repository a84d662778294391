"""Weights are stored once, in the layout in which they are used."""

import hashlib

import numpy as np
import onnx_ir as ir

BIG = 1024  # elements; smaller constants are left to the exporter's own folding


def folds(node: ir.Node) -> bool | None:
    """May the exporter compute this node once and for all? None leaves it to the exporter's own rules.

    One that rearranges a weight must stay: folded, a second copy of it would be in memory and, used in both lanes, in
    the file. But the few rows of the embedding that the gate compares with are all that it needs of it.
    """
    big = [value for value in node.inputs if value is not None and _is_weight(value)]
    if node.op_type == "Gather" and big:
        return node.inputs[1] is not None and node.inputs[1].const_value is not None
    return False if big and node.op_type in ("Transpose", "Reshape", "Cast", "Expand") else None


def _is_weight(value: ir.Value) -> bool:
    return value.is_initializer() and value.const_value is not None and value.const_value.size > BIG


def fold_transposes(model: ir.Model) -> None:
    """Replace each Transpose of a weight by a weight stored that way; both lanes then read the same one.

    It is transposed while it is written, so that memory holds one transposed weight at a time.
    """
    graph = model.graph
    folded: dict[tuple[str, tuple[int, ...]], ir.Value] = {}
    for node in list(graph):
        if node.op_type != "Transpose":
            continue
        source = node.inputs[0]
        if source is None or not source.is_initializer() or source.const_value is None:
            continue
        assert source.name is not None
        permutation = tuple(node.attributes["perm"].as_ints())
        key = (source.name, permutation)
        if key not in folded:
            folded[key] = _transposed(source, permutation)
            graph.register_initializer(folded[key])
        node.outputs[0].replace_all_uses_with(folded[key], replace_graph_outputs=True)
        graph.remove(node, safe=True)


def deduplicate(model: ir.Model) -> None:
    """Merge initializers of equal type, shape and content, whatever their size. (onnx-ir's own pass takes none whose
    numbers lie in another order than they are written.)"""
    graph = model.graph
    kept: dict[tuple[ir.DataType, tuple[int, ...], bytes], ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        assert tensor is not None
        digest = hashlib.sha256(tensor.tobytes()).digest()
        first = kept.setdefault((tensor.dtype, tuple(tensor.shape.numpy()), digest), value)
        if first is not value and not value.is_graph_output():
            value.replace_all_uses_with(first)
            del graph.initializers[name]


def _transposed(source: ir.Value, permutation: tuple[int, ...]) -> ir.Value:
    tensor = source.const_value
    assert tensor is not None
    shape = ir.Shape([tensor.shape.numpy()[axis] for axis in permutation])
    name = f"{source.name}.transposed"

    def make() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(tensor.numpy().transpose(permutation)), dtype=tensor.dtype, name=name)

    return ir.val(name, const_value=ir.LazyTensor(make, dtype=tensor.dtype, shape=shape, name=name))
