"""The proof at load: where it is made, what it costs where not, and that it does not hold where the gate would leak."""

import sys
from collections.abc import Callable
from functools import reduce
from typing import Any

import pytest
import torch
import transformers
from conftest import Guard, load
from matrix import hosts
from transformers import LlavaForConditionalGeneration

from sasa_export.runtime.version import TRIED

Guards = Callable[..., Guard]
pytestmark = pytest.mark.xdist_group("llava")

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
    assert "forward" not in vars(model) and model.sasa.settings is model.config.sasa


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
    guarded = guard("llava")
    *path, name = part.split(".")
    owner = reduce(getattr, path, sys.modules[type(guarded.model).__module__])
    monkeypatch.setattr(owner, name, change(getattr(owner, name)))
    with pytest.raises(RuntimeError, match=said):
        load_with(guarded, prove=True)


def test_weights_without_numbers_are_not_asked(guard: Guards) -> None:
    """On the meta device there is nothing to run."""
    model = load(guard("llava").directory, device_map="meta", sasa={"prove": True})
    assert model.device == torch.device("meta")
