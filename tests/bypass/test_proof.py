"""What a model looks at when it is loaded: that its gate holds, and that it judges a few known prompts as before."""

import json
import logging
import shutil
import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cli_steps import settle
from conftest import Guard, load, move_weights
from matrix import hosts
from transformers import LlavaForConditionalGeneration

from sasa_export.runtime.version import TRIED
from sasa_export.writers.cases import Case, known

Guards = Callable[..., Guard]

UNTRIED = "5.99.0"


def load_with(guarded: Guard, **sasa: Any) -> Any:
    return load(guarded.directory, sasa=sasa)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of what `generate` is asked for, in order."""
    asked: list[int] = []
    own = LlavaForConditionalGeneration.generate

    def generate(self: Any, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["input_ids"].shape[1])
        return own(self, inputs, *args, **kwargs)

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", generate)
    return asked


@pytest.mark.parametrize(
    ("version", "settings", "proved"),
    [
        (TRIED[0], {}, False),
        (UNTRIED, {}, True),
        (TRIED[-1], {"prove": True, "gate": "observe"}, True),
        (UNTRIED, {"prove": False}, False),
    ],
)
def test_where_it_is_made(
    guard: Guards, calls: list[int], monkeypatch: pytest.MonkeyPatch, version: str, settings: Any, proved: bool
) -> None:
    """On a version that was tried it costs nothing; the operator can ask for it, or leave it out."""
    guarded = guard("llava")
    monkeypatch.setattr(transformers, "__version__", version)
    model = load_with(guarded, **settings)
    assert bool(calls) == proved
    assert model.config.sasa["threshold"] == guarded.model.config.sasa["threshold"]
    assert "forward" not in vars(model) and not model.sasa.asked


def test_this_version_was_tried() -> None:
    """A new one is entered in TRIED, with a run of all tests."""
    assert transformers.__version__ in TRIED


def other_answers(own: Any) -> Any:
    """A Guard that lets no row be as it was."""

    def forced(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = own(self, *args, **kwargs)
        output.logits = output.logits.flip(-1) if output.logits.amax() != 0 else output.logits
        return output

    return forced


@pytest.mark.parametrize("change", [*hosts.LOST.values()], ids=lambda change: change.__name__)
def test_a_host_that_loses_the_past_loads_nothing(
    guard: Guards, monkeypatch: pytest.MonkeyPatch, change: Callable[..., None]
) -> None:
    own = LlavaForConditionalGeneration.prepare_inputs_for_generation

    def prepare(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        found: dict[str, Any] = own(self, *args, **kwargs)
        if not kwargs.get("is_first_iteration", False):
            change(self, found, hosts.named(found))
        return found

    monkeypatch.setattr(LlavaForConditionalGeneration, "prepare_inputs_for_generation", prepare)
    with pytest.raises(RuntimeError, match=rf"does not hold .*pip install transformers=={TRIED[-1]}"):
        load_with(guard("llava"), prove=True)


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("gate", lambda own: lambda logits, *others: logits, "a refusal is cut short"),
        ("Guard.forward", other_answers, "an allowed answer is not the original's"),
        ("real_tokens", lambda own: lambda mask, *others: own(None, *others), "padding changes a verdict"),
    ],
)
def test_what_does_not_hold_is_said(
    guard: Guards, monkeypatch: pytest.MonkeyPatch, part: str, change: Callable[[Any], Any], said: str
) -> None:
    guarded = guard("llava", lane_tokens=64)  # padding is out of the reach of a few
    *path, name = part.split(".")
    owner = reduce(getattr, path, sys.modules[type(guarded.model).__module__])
    monkeypatch.setattr(owner, name, change(getattr(owner, name)))
    with pytest.raises(RuntimeError, match=said):
        load_with(guarded, prove=True)


def test_weights_without_numbers_are_not_asked(guard: Guards) -> None:
    """On the meta device there is nothing to run."""
    model = load(guard("llava").directory, device_map="meta", use_kernels=False, sasa={"prove": True})
    assert model.device == torch.device("meta")


# ------------------------------------------------------------------------------------------------ known prompts


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
