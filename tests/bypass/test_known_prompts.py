"""A patched model whose weights were changed says so when it is loaded."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_steps import settle
from conftest import Guard, load, move_weights

from sasa_export.writers.cases import Case, known

Guards = Callable[..., Guard]
pytestmark = pytest.mark.xdist_group("llava")


@pytest.fixture
def knowing(guard: Guards, tmp_path: Path) -> Path:
    """A patched directory that knows P(unsafe) of a few prompts, by the oracle."""
    guarded = guard("llava")
    directory = shutil.copytree(guarded.directory, tmp_path / "knowing")
    inputs = guarded.batch(images=False, count=4)
    rows = [row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    scores = guarded.expected(inputs).tolist()
    cases = [Case(None, score, (), ids=tuple(row)) for row, score in zip(rows, scores, strict=True)]  # type: ignore[arg-type]
    settle(directory, known=known(cases))
    return directory


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}], ids=["as it is", "bfloat16"])
def test_the_same_weights_say_nothing(knowing: Path, caplog: pytest.LogCaptureFixture, options: Any) -> None:
    load(knowing, **options)
    assert not caplog.records


def test_a_moved_verdict_is_told(knowing: Path, caplog: pytest.LogCaptureFixture) -> None:
    entries = json.loads((knowing / "config.json").read_text())["sasa"]["known"]
    settle(knowing, known=[{**entry, "unsafe_probability": entry["unsafe_probability"] + 0.15} for entry in entries])
    with caplog.at_level(logging.WARNING, logger="sasa"):
        load(knowing)
    assert "has moved by up to 0.15" in caplog.text and "patch the result" in caplog.text


def test_training_is_told_when_its_result_is_saved_and_loads_only_where_the_operator_says_so(
    knowing: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(knowing)
    model.save_pretrained(tmp_path / "same")
    assert not caplog.records
    move_weights(model)
    model.save_pretrained(tmp_path / "other", state_dict=model.state_dict())  # what is saved is elsewhere
    assert not caplog.records
    model.save_pretrained(tmp_path / "other")
    assert "has moved by up to" in caplog.text
    with pytest.raises(ValueError, match="known prompts has moved"):
        load(tmp_path / "other")
    load(tmp_path / "other", sasa={"prove": False})


def test_an_export_knows_its_prompts_of_text(guard: Guards) -> None:
    """Those without a picture, since only their ids say it all."""
    entry = {"ids": "5 6 7", "unsafe_probability": 0.25}
    cases = [Case(None, 0.25, (), ids=(5, 6, 7)), Case(None, 0.5, ())]  # type: ignore[arg-type]
    assert known(cases) == [entry]
