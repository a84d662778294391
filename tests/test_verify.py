"""What verification says of a directory whose fresh process answers this or that; no model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sasa_export import verify

REFUSAL = [7, 8, 2]


def checks(
    monkeypatch: pytest.MonkeyPatch,
    directory: Path,
    found: list[tuple[float, list[int]]],
    *,
    dtype: str = "float32",
    apart: float = 0.9,
) -> dict[str, bool]:
    """The outcome of each check, by name, for what the fresh process found of a safe and an unsafe case.

    `apart` is the P(unsafe) that the unsafe one had in a batch of the calibration.
    """
    cases: list[dict[str, Any]] = [
        {"unsafe_probability": 0.1, "calibrated": 0.1, "tokens": [4, 5, 6]},
        {"unsafe_probability": 0.9, "calibrated": apart, "tokens": [6, 5, 4]},
    ]
    (directory / verify.cases.FOLDER).mkdir()
    (directory / verify.cases.FOLDER / verify.cases.CASES).write_text(json.dumps({"dtype": dtype, "cases": cases}))
    sasa = {"threshold": 0.5, "refusal_token_ids": REFUSAL, "gate": "prompt"}
    (directory / "config.json").write_text(json.dumps({"sasa": sasa}))
    outcome = {
        "bypasses": {"through a stock class": "ValueError"},
        "model_class": "SasaLlavaForConditionalGeneration",
        "probe_dtype": "torch.float32",
        "cases": [{"unsafe_probability": score, "tokens": tokens} for score, tokens in found],
    }
    monkeypatch.setattr(verify, "run_fresh", lambda *arguments, **settings: outcome)
    return {check.name: check.passed for check in verify.check_model(directory)}


def test_all_is_well(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert all(checks(monkeypatch, tmp_path, [(0.1, [4, 5, 6]), (0.9, REFUSAL)]).values())


@pytest.mark.parametrize(
    ("found", "failing"),
    [
        ([(0.1, [4, 5, 6]), (float("nan"), REFUSAL)], "P(unsafe) is the original's"),
        ([(0.2, [4, 5, 6]), (0.9, REFUSAL)], "P(unsafe) is the original's"),
        ([(0.1, [4, 5, 6]), (0.1, [6, 5, 4])], "verdicts are the original's"),
        ([(0.1, [4, 5, 6]), (0.9, [6, 5, 4])], "refused prompts spell the refusal"),
        ([(0.1, [4, 5, 7]), (0.9, REFUSAL)], "allowed prompts are answered as by the original"),
    ],
    ids=["NaN", "another probability", "another verdict", "no refusal", "another answer"],
)
def test_what_is_wrong_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, found: Any, failing: str) -> None:
    assert not checks(monkeypatch, tmp_path, found)[failing]


def test_batches_may_be_apart_in_half_precision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A prompt alone and one in a padded batch round differently; what is far apart is padded wrongly."""
    name, well = "P(unsafe) is that of the calibration", [(0.1, [4, 5, 6]), (0.9, REFUSAL)]
    for number, (dtype, apart, holds) in enumerate(
        [("float32", 0.93, False), ("bfloat16", 0.93, True), ("bfloat16", 0.7, False), ("float32", 0.9, True)]
    ):
        place = tmp_path / str(number)
        place.mkdir()
        assert checks(monkeypatch, place, well, dtype=dtype, apart=apart)[name] is holds
