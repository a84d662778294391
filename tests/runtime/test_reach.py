"""`--lane-tokens`: the second lane over the last tokens alone is the oracle's, however these were fed, and in ONNX."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import labelled
import oracle
import pytest
import tiny
import torch
import transformers
from conftest import Guard
from feeding import chunkings, feed, last_picture_token

from sasa_export import Options, patch
from sasa_export.gate import GateSpec

Guards = Callable[..., Guard]

TOLERANCE = 1e-5
FAST = ("llava", "gemma3", "qwen2_5_vl", "lfm2_vl")


def families(*fast: int, slow: tuple[int, ...] = ()) -> Any:
    """Every family with each reach; the fast run tries the `fast` reaches in one family of each kind."""
    cases = [
        pytest.param(family, reach, marks=[pytest.mark.slow] * (family not in FAST or reach in slow))
        for family in tiny.MAKERS
        for reach in (*fast, *slow)
        if (family, transformers.__version__) not in tiny.BROKEN
    ]
    return pytest.mark.parametrize(("family", "reach"), cases)


@pytest.fixture
def guarded(guard: Guards, family: str, reach: int) -> Guard:
    layers = () if family in tiny.FAMILIES else (tiny.SAFETY, tiny.SEMANTIC)
    return guard(family, *layers, lane_tokens=reach)


@families(8, 64, slow=(1,))
@torch.no_grad()
def test_oracle(guarded: Guard, family: str, reach: int) -> None:
    """P(unsafe) is that of two passes, the second on as many tokens, and of no more; 64 is more than some rows have."""
    for images, padding_side in [(True, "left"), (True, "right"), (False, "left"), (False, "right")]:
        inputs = guarded.batch(images=images, padding_side=padding_side)
        expected = guarded.expected(inputs)  # (batch,)
        found = guarded.model(**inputs).unsafe_probability
        torch.testing.assert_close(found, expected, rtol=0.0, atol=TOLERANCE)
        apart = (replace(guarded, reach=None).expected(inputs) - expected).abs()  # (batch,)
        short = inputs["attention_mask"].sum(-1) <= reach  # (batch,)
        assert (apart[short] < TOLERANCE).all() and (apart[~short] > TOLERANCE).all()


@families(8, slow=(4,))
@torch.no_grad()
def test_pieces(guarded: Guard, family: str, reach: int) -> None:
    """A prompt in pieces is judged as the whole one, also where the last call brings less than the lane runs over."""
    inputs = guarded.batch(count=3, seed=4)
    expected = guarded.expected(inputs)  # (batch,)
    first, tolerance = last_picture_token(guarded, inputs), TOLERANCE
    if family in tiny.RECURRENT:
        first, tolerance = max(first, int((inputs["attention_mask"] == 0).sum(-1).max()) + 1), 10 * TOLERANCE
    for ends in chunkings(inputs["input_ids"].shape[1], first, 4):
        found = feed(guarded, inputs, ends)
        torch.testing.assert_close(found.unsafe_probability, expected, rtol=0.0, atol=tolerance)


@families(8)
@torch.no_grad()
def test_second_turn(guarded: Guard, family: str, reach: int) -> None:
    """The lane runs over the last tokens of the whole conversation, of which the last call brings one alone."""
    inputs = guarded.batch(count=1, seed=3)
    more = guarded.batch(images=False, count=1, seed=9)["input_ids"]  # (1, tokens)
    ids = torch.cat([inputs["input_ids"], torch.tensor([[70, 71, guarded.refusal[-1]]]), more], dim=1)  # (1, context)
    whole = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in oracle.TYPES:
        if name in inputs:
            whole[name] = torch.nn.functional.pad(inputs[name], (0, ids.shape[1] - inputs[name].shape[1]))
    start, end = inputs["input_ids"].shape[1], ids.shape[1]
    for ends in ([start, start + 3, end], [start, start + 1, end - 1, end]):
        found = feed(guarded, whole, ends)
        torch.testing.assert_close(found.unsafe_probability, guarded.expected(whole), rtol=0.0, atol=10 * TOLERANCE)


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
    torch.testing.assert_close(guarded.model.judge(**inputs), guarded.expected(inputs), rtol=0.0, atol=TOLERANCE)


def test_the_directory_says_it(guard: Guards) -> None:
    """Configuration and card."""
    guarded = guard("llava", lane_tokens=7)
    assert GateSpec.from_json(guarded.model.config.sasa).lane_tokens == 7
    card = " ".join((guarded.directory / "README.md").read_text().split())
    for words in ("once more on the result, on the last 7 tokens alone,", "and over its last 7 tokens 3 once more"):
        assert words in card


@pytest.mark.slow
@pytest.mark.parametrize(("family", "form"), [("llava", "both"), ("qwen2_5_vl", "safetensors")])
def test_export(tiny_model: Callable[..., Path], tmp_path: Path, family: str, form: str) -> None:
    """Layers are found, and the probe is fitted, on what the patched model judges by: it verifies, in each format."""
    calibration = labelled.write_set(tmp_path, "calibration", 1, 60)
    options = Options(
        str(tiny_model(family)), tmp_path / "out", calibration=(str(calibration),), max_false_positive_rate=0.2,
        safety_layer=2, semantic_layer="auto", batch_size=8, refusal="I will not help.", lane_tokens=6, format=form,
    )  # fmt: skip
    done = patch(options)
    assert done.calibration is not None and done.cases and (done.gate.semantic_layer or 0) > 2
