"""Stores each weight once, in the layout in which it is used."""

import numpy as np
import onnx_ir as ir

BIG = 1024  # elements; smaller constants are left to the exporter's own folding


def folds(node: ir.Node) -> bool | None:
    """Return whether the exporter may fold this node into a constant. None leaves it to the exporter's own rules.

    A node that rearranges a weight must stay: folding it would put a second copy of the weight into memory.
    """
    big = any(value is not None and _is_weight(value) for value in node.inputs)
    return False if big and node.op_type in ("Transpose", "Reshape", "Cast", "Expand") else None


def _is_weight(value: ir.Value) -> bool:
    return value.is_initializer() and value.const_value is not None and value.const_value.size > BIG


def fold_transposes(model: ir.Model) -> None:
    """Replace each Transpose of a weight by a weight that is stored transposed.

    Each weight is transposed while it is written, so that memory holds one transposed weight at a time.
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


def _transposed(source: ir.Value, permutation: tuple[int, ...]) -> ir.Value:
    tensor = source.const_value
    assert tensor is not None
    shape = ir.Shape([tensor.shape.numpy()[axis] for axis in permutation])
    name = f"{source.name}.transposed"

    def make() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(tensor.numpy().transpose(permutation)), dtype=tensor.dtype, name=name)

    return ir.val(name, const_value=ir.LazyTensor(make, dtype=tensor.dtype, shape=shape, name=name))
