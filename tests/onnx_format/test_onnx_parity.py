"""The exported graphs say what torch says: logits, P(unsafe), refusals and answers, for every family."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import tiny
from onnx_runner import STEPS, TOLERANCE, Runner, follow, positions

from sasa_export.models.family import onnx_recipes

FAMILIES = [
    pytest.param(family, marks=[pytest.mark.xdist_group(f"onnx-{family}"), *[pytest.mark.slow] * (family != "llava")])
    for family in tiny.MAKERS
    if family in onnx_recipes()
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("images", [False, True], ids=["text", "images"])
def test_prompts_and_steps(family: str, images: bool, split: Any, exported: Any) -> None:
    guard = split(family)
    runner = Runner(exported(guard.directory))
    seen = set()
    for count in (1, 3, 6):
        inputs = guard.batch(count=count, images=images)
        states, differences = follow(guard, runner, inputs, STEPS)
        assert max(differences) < TOLERANCE, differences
        seen |= set(states)
    if images:
        assert seen == {0.0, float(len(guard.refusal))}, "both verdicts must have been seen"


@pytest.mark.parametrize("family", FAMILIES)
def test_right_padding(family: str, split: Any, exported: Any) -> None:
    guard = split(family)
    _, differences = follow(guard, Runner(exported(guard.directory)), guard.batch(count=3, padding_side="right"), 0)
    assert max(differences) < TOLERANCE


@pytest.mark.parametrize("reach", [8, *(pytest.param(reach, marks=pytest.mark.slow) for reach in (1, 64))])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_lane_over_the_last_tokens(family: str, reach: int, split: Any, exported: Any) -> None:
    """Whole, under pads on either side, and in pieces, of which the last brings one token; 64 is more than all."""
    guard = split(family, lane_tokens=reach)
    runner = Runner(exported(guard.directory))
    for side, images in (("left", True), ("right", True), ("left", False)):
        inputs = guard.batch(count=6, images=images, padding_side=side)
        _, differences = follow(guard, runner, inputs, 1 if side == "left" else 0)
        assert max(differences) < TOLERANCE
    runner.ask(guard, inputs)
    np.testing.assert_allclose(runner.probability, guard.expected(inputs).numpy(), rtol=0, atol=TOLERANCE)
    alone = guard.batch(count=1, images=False)
    tokens, mask = alone["input_ids"].numpy(), alone["attention_mask"].numpy()  # (1, tokens)
    count = tokens.shape[1]
    for ends in ([count - 1, count], [count // 2, count - 3, count]):
        runner.pieces(runner.embed(tokens), mask, positions(guard, alone)[0].numpy(), ends)
        np.testing.assert_allclose(runner.probability, guard.expected(alone).numpy(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_runtimes_are_fast_at_and_count_by(family: str, split: Any, exported: Any) -> None:
    """Attention and norms are not taken apart, and config.json counts the gate's layers of the cache too."""
    guard = split(family)
    directory, nodes = exported(guard.directory), guard.model.config.sasa["graph"]
    decoder = ir.load(directory / "onnx" / "decoder_model_merged.onnx")
    cached = {str(value.name).split(".")[1] for value in decoder.graph.inputs if str(value.name).startswith("past")}
    assert len(cached) == json.loads((directory / "config.json").read_text())["text_config"]["num_hidden_layers"]
    blocks = [node["index"] for node in nodes if node["op"] in ("block", "lane_block")]
    keys = {value.name for value in decoder.graph.inputs}
    attending = [index for index in blocks if f"past_key_values.{index}.key" in keys]
    counts = Counter(node.op_type for node in decoder.graph.all_nodes())
    assert counts["Attention"] == len(attending) and counts["RMSNormalization"] >= 2 * len(blocks)


@pytest.mark.slow
@pytest.mark.xdist_group("onnx-llava")
def test_old_opset(split: Any, exported: Any) -> None:
    guard = split("llava")
    directory = exported(guard.directory, opset=20)
    nodes = ir.load(directory / "onnx" / "decoder_model_merged.onnx").graph.all_nodes()
    counts = Counter(node.op_type for node in nodes)
    assert counts["Softmax"] == 9, "six blocks and the three of the lane"
    assert not counts["IsNaN"], "WebGPU has no kernel for it"
    runner = Runner(directory)
    for count in (1, 6):
        _, differences = follow(guard, runner, guard.batch(count=count), STEPS)
        assert max(differences) < TOLERANCE


class OpenVino:
    """A decoder that OpenVINO runs in float32, to be asked as the session that it stands for."""

    def __init__(self, openvino: Any, path: Path, session: Any) -> None:
        self.get_inputs, self.get_overridable_initializers = session.get_inputs, session.get_overridable_initializers
        core = openvino.Core()
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
        self.model = core.compile_model(core.read_model(path), "CPU", options)

    def run(self, names: list[str], feed: dict[str, Any]) -> list[Any]:
        taken = {name for value in self.model.inputs for name in value.names}
        found = self.model({name: value for name, value in feed.items() if name in taken})
        return [np.array(found[name]) for name in names]


@pytest.mark.slow
@pytest.mark.xdist_group("onnx-llava")
@pytest.mark.parametrize("side", ["left", "right"])
def test_openvino(side: Any, split: Any, exported: Any) -> None:
    unavailable = "OPENVINO IS NOT INSTALLED: that it judges as torch does was NOT tested"
    openvino = pytest.importorskip("openvino", reason=unavailable)
    guard = split("llava")
    directory = exported(guard.directory, opset=20)
    runner = Runner(directory)
    runner.decoder = OpenVino(openvino, directory / "onnx" / "decoder_model_merged.onnx", runner.decoder)
    seen = set()
    for count in (1, 3, 6):
        inputs = guard.batch(count=count, padding_side=side)
        states, differences = follow(guard, runner, inputs, STEPS if side == "left" else 0)
        assert max(differences) < TOLERANCE, differences
        seen |= set(states)
    assert side == "right" or seen == {0.0, float(len(guard.refusal))}, "both verdicts must have been seen"
