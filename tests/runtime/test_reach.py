"""`--lane-tokens`: the second lane runs over as many of the last tokens. Other tests have the default, 8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import labelled
import pytest
import tiny
import torch
from conftest import Guard
from feeding import chunkings, feed, last_picture_token

from sasa_export import Options, patch
from sasa_export.gate import GateSpec

Guards = Callable[..., Guard]

TOLERANCE = 1e-5
FAST = ("llava", "gemma3", "qwen2_5_vl", "lfm2_vl")


@pytest.mark.parametrize("family", FAST)
@pytest.mark.parametrize("reach", [64, pytest.param(1, marks=pytest.mark.slow)])
@torch.no_grad()
def test_oracle(guard: Guards, family: str, reach: int) -> None:
    """P(unsafe) is that of two passes, the second on as many tokens, and of no more; 64 is more than some rows have.
    A prompt in pieces is judged as the whole one, also where the last call brings less than the lane runs over."""
    layers = () if family in tiny.FAMILIES else (tiny.SAFETY, tiny.SEMANTIC)
    guarded = guard(family, *layers, lane_tokens=reach)
    for images, padding_side in [(True, "left"), (True, "right"), (False, "left"), (False, "right")]:
        inputs = guarded.batch(images=images, padding_side=padding_side)
        expected = guarded.expected(inputs)  # (batch,)
        found = guarded.model(**inputs).unsafe_probability
        torch.testing.assert_close(found, expected, rtol=0.0, atol=TOLERANCE)
        apart = (replace(guarded, reach=None).expected(inputs) - expected).abs()  # (batch,)
        short = inputs["attention_mask"].sum(-1) <= reach  # (batch,)
        assert (apart[short] < TOLERANCE).all() and (apart[~short] > TOLERANCE).all()
    inputs = guarded.batch(count=3, seed=4)
    expected, tolerance, first = guarded.expected(inputs), TOLERANCE, last_picture_token(guarded, inputs)
    if family in tiny.RECURRENT:
        first, tolerance = max(first, int((inputs["attention_mask"] == 0).sum(-1).max()) + 1), 10 * TOLERANCE
    for ends in chunkings(inputs["input_ids"].shape[1], first, 4):
        found = feed(guarded, inputs, ends).unsafe_probability
        torch.testing.assert_close(found, expected, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl"])
@torch.no_grad()
def test_answers(guard: Guards, family: str) -> None:
    """`generate` refuses and answers by it, and `judge` says it, also where the lane begins amid a picture."""
    one = guard(family).batch(count=1)
    reach = one["input_ids"].shape[1] - last_picture_token(guard(family), one) + 4
    guarded = guard(family, lane_tokens=reach)
    assert (one["input_ids"][0, -reach:] == guarded.model.config.image_token_id).sum() in range(1, 5)
    torch.testing.assert_close(guarded.model.judge(**one), guarded.expected(one), rtol=0.0, atol=TOLERANCE)
    inputs = guarded.batch()
    prompt = inputs["input_ids"].shape[1]
    expected = guarded.stock.generate(**inputs, max_new_tokens=16)[:, prompt:]  # (batch, up to 16)
    with guarded.halved(inputs) as refused:
        found = guarded.model.generate(**inputs, max_new_tokens=16)[:, prompt:]
    guarded.check_answers(found, expected, refused)


def test_the_directory_says_it(guard: Guards) -> None:
    """Configuration and card."""
    guarded = guard("llava", lane_tokens=7)
    assert GateSpec.from_json(guarded.model.config.sasa).lane_tokens == 7
    card = " ".join((guarded.directory / "README.md").read_text().split())
    for words in ("once more on the result, on the last 7 tokens alone,", "and over its last 7 tokens 3 once more"):
        assert words in card


@pytest.mark.slow
@pytest.mark.parametrize(("family", "form"), [("llava", "both"), ("qwen2_5_vl", "safetensors")])
def test_export(tiny_model: Callable[..., Path], tmp_path: Path, family: str, form: Any) -> None:
    """Layers are found, and the probe is fitted, on what the patched model judges by: it verifies, in each format."""
    calibration = labelled.write_set(tmp_path, "calibration", 1, 60)
    options = Options(
        str(tiny_model(family)), tmp_path / "out", calibration=(str(calibration),), max_false_positive_rate=0.2,
        safety_layer=2, semantic_layer="auto", batch_size=8, refusal="I will not help.", lane_tokens=6, format=form,
    )  # fmt: skip
    done = patch(options)
    assert done.calibration is not None and done.cases and (done.gate.semantic_layer or 0) > 2
