"""Every node of an exported decoder has a kernel in onnxruntime's CUDA provider, in its type: none waits for the CPU.

The provider itself is asked, with no GPU: see tools/placement.py.
"""

import shutil
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
from placement import place

PROVIDERS = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
TOOLS = ("gcc", "nm", "readelf")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("onnx-llava"),
    pytest.mark.skipif(
        not PROVIDERS.exists() or not all(map(shutil.which, TOOLS)),
        reason=f"NO ONNXRUNTIME-GPU, OR NONE OF {', '.join(TOOLS)}: that nodes have CUDA kernels was NOT tested",
    ),
]
MAIN, BRANCH = "main_graph", "unsafe_probability.then"


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int4"])
def test_every_node_has_a_kernel(opset: int, dtype: str, split: Any, exported: Any) -> None:
    directory = exported(split("llava").directory, opset=opset, dtype=dtype)
    (graph,) = (directory / "onnx").glob("decoder_model_merged*.onnx")
    found = place(graph)
    assert not found.missing
    # The condition of the branch, and sizes that shapes are computed from; each step of an answer waits for the first.
    assert found.copies[MAIN] <= 3
    assert found.copies[BRANCH] <= 7
    assert found.gpu > 500


def test_a_node_without_a_kernel_is_named(tmp_path: Path) -> None:
    given, sums, largest = (
        ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["rows", size]))
        for name, size in (("given", 4), ("sums", 4), ("largest", 1))
    )
    nodes = [
        ir.Node("", "Add", [given, given], outputs=[sums], name="with"),
        ir.Node("", "ArgMax", [sums], [ir.AttrInt64("axis", 1)], outputs=[largest], name="without"),
    ]
    graph = ir.Graph([given], [largest], nodes=nodes, opset_imports={"": 20}, name=MAIN)
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "graph.onnx")
    found = place(tmp_path / "graph.onnx")
    assert found.missing == ["ArgMax (without)"]
    assert found.gpu == 1
    assert found.copies == {MAIN: 1}
