"""The probe that smol-llava ships with is the one that its own calibration would give."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sasa_export.graph.rewrite import LaneSettings, rewrite_lane
from sasa_export.graph.trace import trace_source
from sasa_export.models import layers_of, open_source
from sasa_export.models.load import load_model, load_processor
from sasa_export.probe import bundled
from sasa_export.probe.calibration import Fitted, with_threshold
from sasa_export.probe.features import collect
from sasa_export.probe.fit import probability
from sasa_export.prompts import builtin, for_model

SMOL = "smol-llava"


def usual() -> LaneSettings:
    return LaneSettings(*layers_of(open_source(SMOL), 30, 576, None, None)[:2])


def read(settings: LaneSettings | None = None, model: str = SMOL, data: Sequence[str] = (), c: Any = "auto") -> Any:
    return bundled.read(model, settings or usual(), data, c)


@pytest.mark.smol
def test_it_is_there_for_what_it_was_fitted_with_alone() -> None:
    settings, prompts = usual(), for_model(builtin(), load_processor(open_source(SMOL)))
    found = read()
    assert isinstance(found, Fitted) and list(found.probes) == ["projected", "plain"]
    assert {len(scores) for scores in (found.final, *found.scores.values())} == {len(prompts)}
    others = ({"safety_layer": 10}, {"epsilon": 1e-3}, {"tokens": 16})
    for other in (*(replace(settings, **change) for change in others), LaneSettings(None, None)):
        assert read(other) is None
    assert read(model="other") is None and read(data=("mine.jsonl",)) is None and read(c=1.0) is None


@pytest.mark.smol
def test_another_calibration_set_leaves_it_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = tmp_path / "builtin.jsonl"
    changed.write_bytes(bundled.DATA[0].read_bytes() + b"\n")
    monkeypatch.setattr(bundled, "DATA", (changed, *bundled.DATA[1:]))
    assert read() is None


@pytest.mark.smol
@pytest.mark.slow
@pytest.mark.xdist_group("smol")
def test_its_scores_come_out_again() -> None:
    source, settings = open_source(SMOL), usual()
    processor, found = load_processor(source), read()
    prompts = for_model(builtin(), processor)
    rows = list(range(7, len(prompts), len(prompts) // 24))
    model = load_model(source, dtype="bfloat16", device="cpu")  # as it was fitted
    lane = rewrite_lane(trace_source(source, processor), settings)
    features = collect(model, processor, lane, [prompts[row] for row in rows], batch_size=8)
    weight, bias = found.probes["projected"]
    again = probability(features.projected.astype(np.float64), weight.astype(np.float64), bias)
    np.testing.assert_allclose(again, found.final[rows], rtol=0, atol=0.1)  # rounding goes by the batch
    assert np.abs(again - found.final[rows]).mean() < 0.02
    # What it is worth is what the documents say.
    by_part = {figure.part: figure for figure in with_threshold(found, prompts, max_false_positive_rate=0.02).figures}
    assert by_part["text"].auc > 0.93 and by_part["all"].false_positive_rate <= 0.02
