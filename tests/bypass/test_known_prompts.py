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
from conftest import Guard, load
from safetensors.torch import load_file, save_file

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


def change(directory: Path, much: float) -> None:
    """Add noise to the weights of every block."""
    torch.manual_seed(0)
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if "layers" in name and tensor.dim() == 2:
                tensors[name] = tensor + much * tensor.std() * torch.randn_like(tensor)
        save_file(tensors, path, metadata={"format": "pt"})


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


def test_other_weights_are_an_error_unless_the_operator_says_otherwise(knowing: Path) -> None:
    change(knowing, 1.0)
    with pytest.raises(ValueError, match="known prompts has moved"):
        load(knowing)
    load(knowing, sasa={"prove": False})


def test_training_is_told_when_its_result_is_saved(
    knowing: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(knowing)
    model.save_pretrained(tmp_path / "same")
    assert not caplog.records
    torch.manual_seed(0)
    for block in model.model.language_model.layers:
        block.mlp.down_proj.weight.data += torch.randn_like(block.mlp.down_proj.weight)
    model.save_pretrained(tmp_path / "other", state_dict=model.state_dict())  # what is saved is elsewhere
    assert not caplog.records
    model.save_pretrained(tmp_path / "other")
    assert "has moved by up to" in caplog.text
    with pytest.raises(ValueError, match="known prompts has moved"):
        load(tmp_path / "other")


def test_an_export_knows_its_prompts_of_text(guard: Guards) -> None:
    """Those without a picture, since only their ids say it all."""
    entry = {"ids": "5 6 7", "unsafe_probability": 0.25}
    cases = [Case(None, 0.25, (), ids=(5, 6, 7)), Case(None, 0.5, ())]  # type: ignore[arg-type]
    assert known(cases) == [entry]
