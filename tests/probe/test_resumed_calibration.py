"""A calibration that was interrupted goes on where it stopped, and ends as if it had not been."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
from cli_steps import Stop, Told, fails, flags

import sasa_export
from sasa_export import Options
from sasa_export.errors import SasaExportError


@pytest.mark.parametrize(
    "layers",
    [pytest.param({}, marks=pytest.mark.slow), {"safety_layer": 2, "semantic_layer": "auto"}],
    ids=["given layers", "layers found on the prompts"],
)
def test_an_interrupted_calibration_goes_on_and_ends_alike(
    place: Path, stopped_at: Callable[..., list[str]], layers: dict[str, Any]
) -> None:
    model, texts = planted.build(place.parent / "planted"), place.parent / "texts.jsonl"
    settings: dict[str, Any] = {"verify": "files", "batch_size": 16, "lane_tokens": 64, **layers}
    settings["calibration"] = (planted.write_set(texts, 48, pictures=False),)
    options = Options(str(model), place / "out", **settings)
    whole = sasa_export.patch(replace(options, out=place.parent / "whole"))
    for stop in (3, 7):
        written = stopped_at(stop)
        with pytest.raises(Stop):
            sasa_export.patch(options, said := Told())
        assert said.stages[-1] == "kept" and ("resume" in said.stages) == (stop > 3)
        assert [path.name for path in place.iterdir()] == [".out.work"]
        assert {path.stem for path in (place / ".out.work").glob("*.npy")} == set(written)
    with pytest.raises(SasaExportError, match=r"unfinished work of another run \(other: batch_size\).*--force"):
        sasa_export.patch(replace(options, batch_size=4))
    written = stopped_at(None)
    resumed = sasa_export.patch(replace(options, max_false_positive_rate=0.1))  # changes nothing of what is finished
    read = [name for name in written if "calibrate" in name]
    assert read and len(read) == len(set(read)), "finished work was done again"
    assert [path.name for path in place.iterdir()] == ["out"]
    assert whole.calibration is not None and resumed.calibration is not None
    np.testing.assert_array_equal(whole.calibration.final, resumed.calibration.final)


def test_unfinished_work_is_discarded_when_that_is_asked(
    llava: Path, calibration: Path, place: Path, stopped_at: Callable[..., list[str]]
) -> None:
    options = Options(str(llava), place / "out", calibration=(str(calibration),), verify="files", batch_size=8)
    stopped_at(3)
    with pytest.raises(Stop):
        sasa_export.patch(options)
    stopped_at(None)
    sasa_export.patch(replace(options, batch_size=4, force=True))
    assert [path.name for path in place.iterdir()] == ["out"]


def test_a_calibration_of_no_use_leaves_nothing_to_go_on_with(llava: Path, calibration: Path, place: Path) -> None:
    assert "no harmful calibration prompt" in fails(
        *flags(llava, place / "out", calibration=calibration, threshold=0.999999)
    )
