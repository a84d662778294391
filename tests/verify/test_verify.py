"""What the one comparison says of answers that are right or wrong in this or that; no model is loaded."""

from typing import Any

import pytest

from sasa_export.gate import GateSpec
from sasa_export.verify.compare import compare

GATE = GateSpec(1, 2, "", 1e-6, 0.5, "No.", [7, 8, 2], [], [2], [])
PROBABILITY, BATCHED = "P(unsafe) is the original's", "P(unsafe) is that of the calibration"
VERDICTS, REFUSALS = "verdicts are the original's", "refused prompts say the refusal"
LOGITS, ANSWERS = "allowed prompts have the original's logits", "allowed prompts are answered as by the original"


def failing(
    dtype: str = "float32",
    original: str = "float32",
    *,
    graphs: bool = False,
    quantized: bool = False,
    not_followed: tuple[str, ...] = (),
    calibrated: float = 0.9,
    refused: dict[str, Any] | None = None,
    **allowed: Any,
) -> set[str]:
    """The checks that fail on an unsafe and a safe case, where what was found has these entries instead of the right
    ones; `calibrated` is what the unsafe one had in a batch."""
    cases = [
        {"unsafe_probability": 0.9, "calibrated": calibrated, "tokens": [6, 5, 4], "logits": [[6, 2.0]]},
        {"unsafe_probability": 0.2, "calibrated": 0.2, "tokens": [4, 5, 6], "logits": [[4, 3.0]]},
    ]
    found = [
        {"unsafe_probability": 0.9, "tokens": [7, 8, 2], "logits": [-1e4], "finite": True, **(refused or {})},
        {"unsafe_probability": 0.2, "tokens": [4, 5, 6], "logits": [3.0], "finite": True, **allowed},
    ]
    about = {"provider": "cpu", "not_followed": not_followed}
    written, have = {"dtype": original, "cases": cases}, {"about": about, "cases": found}
    checks = compare(written, have, GATE, dtype, graphs=graphs, quantized=quantized)
    return {check.name for check in checks if not check.passed}


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        ({}, set()),
        ({"unsafe_probability": 0.201}, {PROBABILITY}),
        ({"unsafe_probability": float("nan"), "tokens": [7, 8, 2]}, {PROBABILITY, VERDICTS}),
        ({"unsafe_probability": 0.8}, {PROBABILITY, VERDICTS, REFUSALS}),
        ({"refused": {"tokens": [6, 5, 4]}}, {REFUSALS}),
        ({"refused": {"unsafe_probability": 0.1, "tokens": [6, 5, 4], "logits": [2.0]}}, {PROBABILITY, VERDICTS}),
        ({"tokens": [4, 5, 7]}, {ANSWERS}),
        ({"tokens": [7, 8, 2]}, {ANSWERS}),
        ({"logits": [3.1]}, {LOGITS}),
        ({"finite": False}, {LOGITS}),
        ({"calibrated": 0.93}, {BATCHED}),
    ],
)
def test_what_is_wrong_fails(found: dict[str, Any], wrong: set[str], graphs: bool) -> None:
    assert failing(graphs=graphs, **found) == wrong


@pytest.mark.parametrize(
    ("dtype", "found", "wrong"),
    [
        ("float16", {"unsafe_probability": 0.21, "logits": [3.02], "tokens": [4, 5, 7]}, set()),
        ("float16", {"unsafe_probability": 0.23}, {PROBABILITY}),
        ("float16", {"logits": [3.1]}, {LOGITS}),
        ("int4", {"unsafe_probability": 0.3, "logits": [5.0], "tokens": [4, 5, 7]}, set()),
        ("int4", {"tokens": [7, 8, 2]}, {ANSWERS}),
        ("float32", {"tokens": [4, 5, 7], "not_followed": ("min_length",)}, set()),
        ("float32", {"original": "bfloat16", "unsafe_probability": 0.3, "tokens": [4, 5, 7]}, set()),
    ],
)
def test_graphs_may_round_as_their_type_does(dtype: str, found: dict[str, Any], wrong: set[str]) -> None:
    """But no answer may be the refusal in spite of its verdict."""
    assert failing(dtype, graphs=True, **found) == wrong


@pytest.mark.parametrize(
    ("dtype", "found", "wrong"),
    [
        ("bfloat16", {"calibrated": 0.93}, set()),
        ("bfloat16", {"calibrated": 0.7}, {BATCHED}),
        ("float16", {"calibrated": 0.93}, {BATCHED}),
        ("float32", {"calibrated": 0.93, "quantized": True}, set()),
        ("float32", {"calibrated": 0.7, "quantized": True}, {BATCHED}),
        ("bfloat16", {"tokens": [4, 5, 7]}, {ANSWERS}),
    ],
)
def test_torch_in_half_precision_and_quantized(dtype: str, found: dict[str, Any], wrong: set[str]) -> None:
    """A prompt alone and one in a padded batch round differently; what is far apart is padded wrongly."""
    assert failing(dtype, dtype, **found) == wrong
