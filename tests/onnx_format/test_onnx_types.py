"""Other types of the same graphs: how far they are from float32, and that the gate computes in float32."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx_runner import Runner, lane_of, positions, session

from sasa_export.models import open_source
from sasa_export.onnx import SUFFIX
from sasa_export.onnx.memory import needed_bytes
from sasa_export.onnx.plain import write_embeddings

# Tolerance of P(unsafe) and of the logits, relative to their spread. Random weights suffer most from rounding: what
# 4 bits leave of them says nothing, so there the graph is held to its own verdicts alone.
TOLERANCES = {"float16": (0.02, 0.02), "int8": (0.15, 0.15), "int4": (1.0, 2.0)}
pytestmark = [pytest.mark.xdist_group("onnx-llava"), pytest.mark.slow]


@pytest.fixture
def guarded(split: Any) -> Any:
    return split("llava")


@pytest.fixture(params=TOLERANCES)
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def graphs(dtype: str, guarded: Any, exported: Any) -> Path:
    path: Path = exported(guarded.directory, dtype=dtype)
    return path


def test_close_to_float32(dtype: str, guarded: Any, graphs: Path) -> None:
    inputs, runner = guarded.batch(count=6), Runner(graphs, SUFFIX[dtype])
    ids, following = runner.ask(guarded, inputs)
    with torch.no_grad():
        output = guarded.model(**inputs, position_ids=ids)
    probability, wanted = runner.probability, output.unsafe_probability.numpy()  # (batch,)
    tolerance, spread = TOLERANCES[dtype]
    assert probability is not None and probability.dtype == np.float32
    assert np.abs(probability - wanted).max() < tolerance
    threshold = guarded.model.config.sasa["threshold"]
    refused = probability >= threshold  # (batch,)
    assert not (refused != (wanted >= threshold))[np.abs(wanted - threshold) > tolerance].any(), "a verdict changed"
    said = runner.logits.argmax(-1)  # (batch,)
    assert set(said[refused]) <= {guarded.refusal[0]}
    both = ~refused & (wanted < threshold)
    logits = output.logits[:, -1].numpy()  # (batch, vocabulary)
    if both.any():
        assert np.abs(runner.logits - logits)[both].max() < spread * np.ptp(logits[both])
    for place in range(1, len(guarded.refusal)):
        runner.step(said, following.numpy() + place - 1)
        said = runner.logits.argmax(-1)
        assert set(said[refused]) <= {guarded.refusal[place]}


def test_token_by_token_as_at_once(dtype: str, guarded: Any, graphs: Path) -> None:
    """The template's tokens are recognised whatever the weights are rounded to."""
    inputs = guarded.batch(count=6, images=False)
    ids, _ = positions(guarded, inputs)  # (batch, tokens)
    tokens, mask = inputs["input_ids"].numpy(), inputs["attention_mask"].numpy()  # (batch, tokens)
    runner, found, count = Runner(graphs, SUFFIX[dtype]), [], tokens.shape[1]
    for ends in ([count], range(1, count + 1)):
        runner.pieces(runner.embed(tokens), mask, ids.numpy(), ends)
        assert runner.probability is not None
        found.append(runner.probability)
    assert np.isfinite(found[1]).all()
    # With weights in blocks the states are rounded to 8 bits for each product, where a last bit may tip a whole step.
    np.testing.assert_allclose(found[1], found[0], atol=2e-2)


def test_the_gate_computes_in_float32(dtype: str, graphs: Path) -> None:
    model = ir.load(graphs / "onnx" / f"decoder_model_merged{SUFFIX[dtype]}.onnx")
    lane = lane_of(model)
    exact = [node for node in model.graph.all_nodes() if "/sasa/" in str(node.name) and "/lane/" not in str(node.name)]
    assert exact and not any(node.op_type == "MatMulNBits" for node in exact)
    own = {value.name: value.dtype for value in lane.initializers.values()}
    assert {kind for name, kind in own.items() if "probe" in str(name)} == {ir.DataType.FLOAT}
    arithmetic = [
        value
        for node in lane
        if str(node.name).startswith(("/sasa/projection/", "/sasa/probe/"))
        and node.op_type in ("Mul", "Div", "ReduceSum")
        for value in node.inputs
        if value is not None and value.dtype is not None and value.dtype.is_floating_point()
    ]
    assert arithmetic
    assert {value.dtype for value in arithmetic} == {ir.DataType.FLOAT}


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_embeddings_are_small(dtype: str, graphs: Path) -> None:
    table = ir.load(graphs / "onnx" / f"embed_tokens{SUFFIX[dtype]}.onnx").graph.initializers
    (rows,) = (value for value in table.values() if value.shape is not None and value.shape.numpy()[-1] == 32)
    assert rows.dtype == ir.DataType.INT8


def test_the_estimate_of_the_disk_is_an_upper_bound(dtype: str, graphs: Path, tiny_model: Any) -> None:
    """Of the weights, that is: a tiny graph itself is larger than they are."""
    stored = sum(
        value.const_value.nbytes
        for graph in graphs.glob("onnx/*.onnx")
        if "_and_features" not in graph.name  # whose table is that of embed_tokens
        for part in ir.load(graph).graphs()
        for value in part.initializers.values()
        if value.const_value is not None
    )
    assert stored < needed_bytes(open_source(str(tiny_model("llava"))), dtype) < 2.5 * stored


@torch.no_grad()
def test_rounded_embeddings_are_scaled_as_the_models(stock: Any, tmp_path: Path) -> None:
    model = stock("gemma3")[0]  # its embedding multiplies what it looks up
    write_embeddings(model, tmp_path, opset=23, dtype="int8", merging=False)
    ids = np.arange(64)[None]
    (found,) = session(tmp_path / "embed_tokens_int8.onnx").run(None, {"input_ids": ids})
    wanted = model.get_input_embeddings()(torch.from_numpy(ids)).numpy()  # (1, 64, hidden)
    assert 0 < np.abs(found - wanted).max() < np.abs(wanted).max() / 200
