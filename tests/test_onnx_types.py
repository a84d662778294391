"""Other types of the same graphs: how far they are from float32, and that the gate computes in float32."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx_runner import Runner, batch, image_token, positions

# Tolerance of P(unsafe) and of the logits, relative to their spread. Random weights suffer most from rounding: what
# 4 bits leave of them says nothing, so there the graph is held to its own verdicts alone.
TOLERANCES = {"float16": (0.02, 0.02), "int8": (0.15, 0.15), "int4": (1.0, 2.0)}
SUFFIXES = {"float16": "_fp16", "int8": "_int8", "int4": "_q4"}


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_close_to_float32(dtype: str, split: Any, exported: Any) -> None:
    guard = split("llava")
    inputs = batch(guard, count=6)
    ids, following = positions(guard, inputs)
    arrays = {name: value.numpy() for name, value in inputs.items()}
    runner = Runner(exported(guard.directory, dtype=dtype), SUFFIXES[dtype])
    runner.prompt(arrays, image_token(guard), ids.numpy())
    with torch.no_grad():
        output = guard.model(**inputs, position_ids=ids)
    probability, wanted = runner.probability, output.unsafe_probability.numpy()  # (batch,)
    tolerance, spread = TOLERANCES[dtype]
    assert probability is not None and probability.dtype == np.float32
    assert np.abs(probability - wanted).max() < tolerance
    threshold = guard.model.config.sasa["threshold"]
    refused = probability >= threshold  # (batch,)
    assert not (refused != (wanted >= threshold))[np.abs(wanted - threshold) > tolerance].any(), "a verdict flipped"
    said = runner.logits.argmax(-1)  # (batch,)
    assert set(said[refused]) <= {guard.refusal[0]}
    both = ~refused & (wanted < threshold)
    logits = output.logits[:, -1].numpy()  # (batch, vocabulary)
    if both.any():
        assert np.abs(runner.logits - logits)[both].max() < spread * np.ptp(logits[both])
    for place in range(1, len(guard.refusal)):
        runner.step(said, following.numpy() + place - 1)
        said = runner.logits.argmax(-1)
        assert set(said[refused]) <= {guard.refusal[place]}


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_gate_computes_in_float32(dtype: str, split: Any, exported: Any) -> None:
    path: Path = exported(split("llava").directory, dtype=dtype) / "onnx"
    model = ir.load(path / f"decoder_model_merged{SUFFIXES[dtype]}.onnx")
    (branch,) = (node for node in model.graph if node.op_type == "If")
    lane = branch.attributes["then_branch"].as_graph()
    assert not lane.initializers
    shared = {value.name: value.dtype for value in model.graph.initializers.values()}
    assert {kind for name, kind in shared.items() if "probe" in str(name)} == {ir.DataType.FLOAT}
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
