"""The exported decoder as a file: what it stores, what it is made of, and what it does with calls nobody judged."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import common
from onnx_runner import Runner, lane_of
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

from sasa_export.onnx.passes.attention import trust_finite_masks

BLOCKS = 6  # of the tiny models; the lane is blocks 3, 4 and 5
LEDGER = 2  # cache layers behind those of the blocks
pytestmark = pytest.mark.xdist_group("onnx-llava")


@pytest.fixture(scope="module")
def directory(split: Any, exported: Any) -> Path:
    return exported(split("llava").directory)


@pytest.fixture(scope="module")
def decoder(directory: Path) -> ir.Model:
    return ir.load(directory / "onnx" / "decoder_model_merged.onnx")


@pytest.fixture(scope="module")
def lane(decoder: ir.Model) -> ir.Graph:
    return lane_of(decoder)


def started(guard: Any, directory: Path, count: int = 6) -> tuple[Runner, Any, Any]:
    """A runner that has read a prompt, the prompt, and the next position ids."""
    runner, inputs = Runner(directory), guard.batch(count=count)
    _, following = runner.ask(guard, inputs)
    return runner, inputs, following.numpy()


def test_what_only_the_branch_reads_lies_in_it(decoder: ir.Model, lane: ir.Graph) -> None:
    assert {"sasa.sasa.probe.weight", "sasa.sasa.probe.bias"} <= set(lane.initializers)
    for value in decoder.graph.initializers.values():
        assert any(use.node.graph is decoder.graph for use in value.uses()), value.name


def test_no_weight_is_stored_twice(directory: Path) -> None:
    for path in (directory / "onnx").glob("*.onnx"):
        tensors = [value.const_value for graph in ir.load(path).graphs() for value in graph.initializers.values()]
        kept = [tensor.tobytes() for tensor in tensors if tensor is not None and tensor.nbytes >= 1024]
        assert kept and len(set(kept)) == len(kept), path.name


def test_onnxruntimes_optimizer_for_transformers(split: Any, directory: Path, tmp_path: Path) -> None:
    from onnxruntime.transformers.optimizer import optimize_model

    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    path = copy / "onnx" / "decoder_model_merged.onnx"
    optimize_model(str(path), model_type="gpt2", num_heads=4, hidden_size=32, opt_level=1).save_model_to_file(str(path))
    (first, *_), (second, *_) = (started(split("llava"), place) for place in (directory, copy))
    assert first.probability is not None and second.probability is not None
    np.testing.assert_allclose(second.probability, first.probability, atol=1e-6)
    np.testing.assert_allclose(second.logits, first.logits, atol=1e-4)


def test_nodes_are_named_by_module(decoder: ir.Model, lane: ir.Graph) -> None:
    main = {str(node.name) for node in decoder.graph}
    second = {str(node.name) for node in lane}
    every = [str(node.name) for node in decoder.graph.all_nodes()]
    assert len(set(every)) == len(every)
    assert "/decoder/layers/4/self_attn/q_proj/MatMul" in main
    assert "/decoder/lm_head/MatMul" in main
    assert "/sasa/lane/decoder/layers/4/self_attn/q_proj/MatMul" in second
    assert {"/sasa/lane/decoder/norm/RMSNormalization", "/sasa/probe/Sigmoid"} <= second
    assert any(name.startswith("/sasa/gate/") for name in main)
    assert not any("/layers/2/" in name for name in second)


def test_standard_names_and_no_trace_of_the_machine(directory: Path, decoder: ir.Model) -> None:
    inputs: dict[str, Any] = {str(value.name): value.shape for value in decoder.graph.inputs}
    assert list(inputs)[:3] == ["inputs_embeds", "attention_mask", "position_ids"]
    assert len(inputs) == 3 + 2 * (BLOCKS + LEDGER)
    assert str(inputs["past_key_values.6.key"][0]) == "batch_size"
    assert [value.name for value in decoder.graph.outputs][-1] == "unsafe_probability"
    described = json.loads((directory / "genai_config.json").read_text())["model"]
    assert described["decoder"]["num_hidden_layers"] == BLOCKS + LEDGER
    files = {described[part]["filename"] for part in ("vision", "embedding", "decoder")}
    assert all((directory / file).is_file() for file in files) and len(files) == 3
    for path in (directory / "onnx").glob("*.onnx"):
        content = path.read_bytes()
        for trace in (b"site-packages", b'File "', str(Path.home()).encode(), b"/tmp"):
            assert trace not in content


def test_a_cache_without_its_ledger_fails(split: Any, directory: Path) -> None:
    """Tokens that nobody judged have no answer."""
    guard = split("llava")
    runner, _, following = started(guard, directory)
    for name, value in runner.cache.items():
        if int(name.split(".")[1]) >= BLOCKS:
            runner.cache[name] = value[:, :, :0]
    mask = np.concatenate([runner.mask, np.ones((len(following), 1), np.int64)], axis=1)
    fed = runner.embed(np.full((len(following), 1), 7))  # (batch, 1, hidden)
    with pytest.raises((Fail, InvalidArgument, RuntimeException)):
        runner.call(fed, mask, following)


@pytest.mark.parametrize(
    ("kind", "masked", "looks"), [("float", -3e38, 0), ("float", -np.inf, 1), ("float16", -60000.0, 1)]
)
def test_a_look_for_empty_rows_goes_where_there_can_be_none(kind: str, masked: float, looks: int) -> None:
    """A mask of finite float32 numbers gives softmax no NaN; in float16 the sum with a score may be out of range."""
    text = f"""<ir_version: 9, opset_import: ["" : 20]>
        g ({kind}[2,3] scores, bool[2,3] allowed, {kind} zero, {kind} low) => ({kind}[2,3] weights) {{
            added = Where (allowed, zero, low)
            masked = Add (scores, added)
            soft = Softmax (masked)
            empty = IsNaN (soft)
            kept = Where (empty, zero, soft)
            weights = Identity (kept)
        }}"""
    model = ir.from_onnx_text(text)
    dtype = np.float32 if kind == "float" else np.float16
    for value, number in zip(model.graph.inputs[2:], (0.0, masked), strict=True):
        value.const_value = ir.tensor(np.array(number, dtype))
    trust_finite_masks(model)
    common.RemoveUnusedNodesPass()(model)
    assert sum(node.op_type == "IsNaN" for node in model.graph) == looks
