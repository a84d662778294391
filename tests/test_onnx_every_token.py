"""`--gate every-token` in ONNX: the second lane runs along in every call, and says what it says in torch."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx_runner import Runner, batch, image_token, positions
from test_onnx_parity import further

TOLERANCE = 1e-4
STEPS = 15  # beyond the end of the refusal
SAFETY, SEMANTIC, BLOCKS = 2, 4, 6
# One of each kind of decoder: llava_next has that of llava, and idefics3 that of smolvlm.
FAMILIES = [
    pytest.param(family, marks=pytest.mark.xdist_group(f"onnx-{family}"))
    for family in ("llava", "gemma3", "qwen2_5_vl", "smolvlm")
]


@pytest.fixture(scope="module")
def decoder(guard: Any, exported: Any) -> ir.Model:
    directory: Path = exported(guard("llava", gate="every-token").directory)
    return ir.load(directory / "onnx" / "decoder_model_merged.onnx")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("images", [False, True], ids=["text", "images"])
@torch.no_grad()
def test_each_step_is_judged_as_in_torch(family: str, images: bool, guard: Any, exported: Any) -> None:
    """Logits and P(unsafe) of a prompt and of each further token, whatever was refused until then."""
    guarded = guard(family, gate="every-token")
    runner, inputs = Runner(exported(guarded.directory)), batch(guarded, count=4, images=images)
    ids, following = positions(guarded, inputs)
    arrays = {name: value.numpy() for name, value in inputs.items()}
    runner.prompt(arrays, image_token(guarded), ids.numpy(), **further(runner, inputs))
    output = guarded.model(**inputs, position_ids=ids, use_cache=True)
    mask = inputs["attention_mask"]  # (batch, context)
    for _ in range(STEPS):
        assert runner.probability is not None
        np.testing.assert_allclose(runner.logits, output.logits[:, -1].numpy(), atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(runner.probability, output.unsafe_probability.numpy(), atol=TOLERANCE, rtol=0)
        token = output.logits[:, -1].argmax(-1)  # (batch,)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        output = guarded.model(
            input_ids=token[:, None], attention_mask=mask, position_ids=following,
            past_key_values=output.past_key_values,
        )  # fmt: skip
        runner.step(token.numpy(), following.numpy())
        following = following + 1


@pytest.mark.xdist_group("onnx-llava")
def test_both_lanes_share_blocks_and_weights(decoder: ir.Model) -> None:
    """Blocks f+1.. run once for both lanes, and what is left has no branch."""
    counts = Counter(node.op_type for node in decoder.graph.all_nodes())
    assert counts["If"] == 0
    assert counts["Attention"] == BLOCKS + SEMANTIC - SAFETY
    assert counts["RMSNormalization"] == 2 * (BLOCKS + SEMANTIC - SAFETY) + 2
    stored = Counter(
        (str(value.const_value.dtype), value.const_value.tobytes())
        for value in decoder.graph.initializers.values()
        if value.const_value is not None and value.const_value.size > 8
    )
    assert max(stored.values()) == 1
    names = {str(node.name) for node in decoder.graph}
    lane = {name for name in names if name.startswith("/sasa/lane/layers.") and name.endswith("/Attention")}
    assert lane == {f"/sasa/lane/layers.{block}/self_attn/Attention" for block in range(SAFETY + 1, SEMANTIC + 1)}
    assert {"/sasa/lane/norm/RMSNormalization", "/decoder/layers.5/self_attn/Attention"} <= names
    assert [value.name for value in decoder.graph.outputs][-1] == "unsafe_probability"


@pytest.mark.xdist_group("onnx-llava")
@torch.no_grad()
def test_weights_of_both_lanes_are_quantized_together(guard: Any, exported: Any) -> None:
    guarded = guard("llava", gate="every-token")
    runner = Runner(exported(guarded.directory, dtype="int8"), "_int8")
    graph = ir.load(exported(guarded.directory, dtype="int8") / "onnx" / "decoder_model_merged_int8.onnx").graph
    lane = [node for node in graph if str(node.name).startswith("/sasa/lane/layers.3/self_attn/q_proj/")]
    main = [node for node in graph if str(node.name).startswith("/decoder/layers.3/self_attn/q_proj/")]
    (one,), (other,) = lane, main
    assert one.op_type == "MatMulNBits" and one.inputs[1] is other.inputs[1]
    inputs = batch(guarded, count=4)
    ids, _ = positions(guarded, inputs)
    runner.prompt({name: value.numpy() for name, value in inputs.items()}, image_token(guarded), ids.numpy())
    expected = guarded.expected(inputs)  # (batch,)
    assert runner.probability is not None
    np.testing.assert_allclose(runner.probability, expected.numpy(), atol=0.15, rtol=0)
