"""The exported decoder as a file: what it stores, what it is made of, and what it does with calls nobody judged."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_runner import Runner, batch, image_token, positions

from sasa_export.emit.onnx import export
from sasa_export.errors import EmitError

SINGLE_OPERATORS = {"Attention": 1, "RMSNormalization": 2, "RotaryEmbedding": 2}  # in each block
BLOCKS, LANE = 6, 3  # of the tiny models; the lane is blocks 3, 4 and 5


@pytest.fixture(scope="module")
def directory(split: Any, exported: Any) -> Path:
    return exported(split("llava").directory)


@pytest.fixture(scope="module")
def decoder(directory: Path) -> ir.Model:
    return ir.load(directory / "onnx" / "decoder_model_merged.onnx")


@pytest.fixture(scope="module")
def lane(decoder: ir.Model) -> ir.Graph:
    (branch,) = (node for node in decoder.graph if node.op_type == "If")
    return branch.attributes["then_branch"].as_graph()


def started(guard: Any, directory: Path, count: int = 6) -> tuple[Runner, Any, Any]:
    """A runner that has read a prompt, the prompt, and the next position ids."""
    runner, inputs = Runner(directory), batch(guard, count=count)
    ids, following = positions(guard, inputs)
    runner.prompt({name: value.numpy() for name, value in inputs.items()}, image_token(guard), ids.numpy())
    return runner, inputs, following.numpy()


def test_every_graph_passes_the_checker(directory: Path) -> None:
    paths = list((directory / "onnx").glob("*.onnx"))
    assert len(paths) == 3
    for path in paths:
        onnx.checker.check_model(path, full_check=True)


def test_weights_are_stored_once(decoder: ir.Model, lane: Any, split: Any) -> None:
    assert not lane.initializers
    assert not [node for node in lane if node.op_type == "Constant" and node.outputs[0].const_value.size > 1]
    contents = Counter(
        (str(value.const_value.dtype), value.const_value.tobytes())
        for value in decoder.graph.initializers.values()
        if value.const_value is not None and value.const_value.size > 8
    )
    assert max(contents.values()) == 1
    model = split("llava").model
    parts = (model.model.language_model.layers, model.model.language_model.norm, model.lm_head, model.sasa)
    weights = sum(tensor.nbytes for part in parts for tensor in part.state_dict().values())
    stored = sum(value.const_value.nbytes for value in decoder.graph.initializers.values() if value.const_value)
    assert weights <= stored < weights + 4096


def test_single_operators(decoder: ir.Model, lane: ir.Graph) -> None:
    main = Counter(node.op_type for node in decoder.graph)
    second = Counter(node.op_type for node in lane)
    for operator, each in SINGLE_OPERATORS.items():
        final_norm = operator == "RMSNormalization"
        assert main[operator] == each * BLOCKS + final_norm
        assert second[operator] == each * LANE + final_norm


def test_nodes_are_named_by_module(decoder: ir.Model, lane: ir.Graph) -> None:
    main = {str(node.name) for node in decoder.graph}
    second = {str(node.name) for node in lane}
    assert len(main | second) == len(list(decoder.graph.all_nodes())) - 2  # the other branch has two nodes
    assert "/decoder/layers.4/self_attn/q_proj/MatMul" in main
    assert "/decoder/lm_head/MatMul" in main
    assert "/sasa/lane/layers.4/self_attn/q_proj/MatMul" in second
    assert {"/sasa/lane/norm/RMSNormalization", "/sasa/probe/Sigmoid"} <= second
    assert any(name.startswith("/sasa/projection/") for name in second)
    assert not any("/layers.2/" in name for name in second)


def test_standard_names_and_no_trace_of_the_machine(directory: Path, decoder: ir.Model) -> None:
    inputs: dict[str, Any] = {str(value.name): value.shape for value in decoder.graph.inputs}
    assert list(inputs)[:3] == ["inputs_embeds", "attention_mask", "position_ids"]
    assert len(inputs) == 3 + 2 * (BLOCKS + 1)
    assert str(inputs["past_key_values.6.key"][0]) == "batch_size"
    assert [value.name for value in decoder.graph.outputs][-1] == "unsafe_probability"
    for path in (directory / "onnx").glob("*.onnx"):
        content = path.read_bytes()
        for trace in (b"site-packages", b'File "', str(Path.home()).encode(), b"/tmp"):
            assert trace not in content


def test_several_tokens_on_a_past_are_refused(split: Any, directory: Path) -> None:
    guard = split("llava")
    runner, _, following = started(guard, directory)
    allowed = runner.cache["past_key_values.6.key"][:, 0, -1, 0] == 0
    assert 0 < allowed.sum() < len(allowed)
    ids = np.full((len(allowed), 2), 7)
    mask = np.concatenate([runner.mask, np.ones((len(ids), 2), runner.mask.dtype)], axis=1)
    runner.call(runner.embed(ids), mask, np.concatenate([following, following + 1], axis=1))
    said = runner.logits.argmax(-1)  # (batch,)
    assert set(said[allowed]) == {guard.refusal[0]}, "an allowed row that is fed more must be refused"
    assert set(said[~allowed]) == {guard.refusal[1]}
    runner.step(said, following + 2)
    assert set(runner.logits.argmax(-1)[allowed]) == {guard.refusal[1]}, "and stay so"


@pytest.mark.parametrize("missing", ["verdict", "past"])
def test_a_past_without_its_verdict_is_refused(missing: str, split: Any, directory: Path) -> None:
    guard = split("llava")
    runner, _, following = started(guard, directory)
    for name, value in runner.cache.items():
        if name.startswith("past_key_values.6.") == (missing == "verdict"):
            runner.cache[name] = value[:, :, :0]
    mask = np.ones((len(following), 1), np.int64)
    past = runner.cache["past_key_values.0.key"].shape[2]
    runner.call(
        runner.embed(np.full((len(following), 1), 7)), np.concatenate([np.ones((len(mask), past), np.int64), mask], 1),
        following,
    )  # fmt: skip
    assert set(runner.logits.argmax(-1)) <= set(guard.refusal[:2])


@pytest.mark.parametrize(
    ("settings", "message"), [({"opset": 17}, "opset 17"), ({"dtype": "float8"}, "dtype 'float8'")]
)
def test_bad_settings(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(EmitError, match=message):
        export(tmp_path / "patched", tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())
