"""`--lane-tokens`: the second lane over the last tokens alone is the oracle's, however these were fed, and in ONNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import tiny
import torch
import transformers
from conftest import Guard
from feeding import chunkings, feed, last_picture_token

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


@families(8, slow=(1, 64))
@torch.no_grad()
def test_oracle(guarded: Guard, family: str, reach: int) -> None:
    """P(unsafe) is that of two passes, the second on as many tokens, and of no more; 64 is more than some rows have."""
    for images, padding_side in [(True, "left"), (True, "right"), (False, "left"), (False, "right")]:
        inputs = guarded.batch(images=images, padding_side=padding_side)
        expected = guarded.expected(inputs)  # (batch,)
        found = guarded.model(**inputs).unsafe_probability
        torch.testing.assert_close(found, expected, rtol=0.0, atol=TOLERANCE)
        assert guarded.safety is not None and guarded.semantic is not None
        logits = oracle.oracle_logits(guarded.stock, inputs, guarded.safety, guarded.semantic)
        apart = (oracle.unsafe_probability(logits, guarded.weight, guarded.bias) - expected).abs()  # (batch,)
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
