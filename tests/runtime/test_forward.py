"""The forward pass with options and in other forms; types, copies and torch.compile are rows of the matrix."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Guard

Guards = Callable[..., Guard]

FAMILIES = [
    pytest.param(family, marks=[pytest.mark.xdist_group(family), *[pytest.mark.slow] * (family != "llava")])
    for family in ("llava", "gemma3", "qwen2_5_vl")
]
every_family = pytest.mark.parametrize("family", FAMILIES)

OPTIONS: dict[str, dict[str, Any]] = {
    "hidden states": {"output_hidden_states": True},
    "the last logits": {"logits_to_keep": 1},
    "some logits": {"logits_to_keep": 3},
    "logits by position": {"logits_to_keep": torch.tensor([0, -1])},
    "no cache": {"use_cache": False},
    "a tuple": {"return_dict": False},
}


@every_family
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_options(guard: Guards, family: str, padding_side: str, name: str) -> None:
    """The output is the stock model's in allowed rows, and forced in refused ones at their last prompt token.

    Under either padding, the last column lies at or behind that token.
    """
    guarded, options = guard(family), OPTIONS[name]
    inputs = guarded.batch(padding_side=padding_side)
    expected = guarded.stock(**inputs, **options)
    with guarded.halved(inputs) as refused:
        found = guarded.model(**inputs, **options)
    assert isinstance(found, tuple) == isinstance(expected, tuple)
    logits = found[0] if isinstance(found, tuple) else found.logits  # (batch, kept, vocabulary)
    assert torch.equal(logits[~refused], expected[0][~refused])
    assert (logits[refused, -1].argmax(dim=-1) == guarded.refusal[0]).all()
    if name == "hidden states":
        states = zip(found.hidden_states, expected.hidden_states, strict=True)
        assert all(torch.equal(own, stock) for own, stock in states)


@every_family
@torch.no_grad()
def test_gradient_checkpointing(guard: Guards, family: str) -> None:
    """A copy in training mode has the gate with it too."""
    guarded = guard(family)
    inputs = guarded.batch()
    with guarded.halved(inputs) as refused:
        twin = copy.deepcopy(guarded.model).train()
        twin.gradient_checkpointing_enable()
        output = twin(**inputs)
    torch.testing.assert_close(output.unsafe_probability, guarded.expected(inputs), rtol=0.0, atol=1e-5)
    assert torch.equal(output.logits[:, -1].argmax(dim=-1) == guarded.refusal[0], refused)


@every_family
@torch.no_grad()
def test_autocast(guard: Guards, family: str) -> None:
    """Under autocast the gate judges and refuses too."""
    guarded = guard(family)
    inputs = guarded.batch()
    with guarded.at(1e-6), torch.autocast("cpu", dtype=torch.bfloat16):
        found = guarded.model(**inputs).unsafe_probability  # (batch,)
        said = guarded.model.generate(**inputs, max_new_tokens=len(guarded.refusal))
    assert found.dtype == torch.float32
    assert (found - guarded.expected(inputs)).abs().max() < 0.2
    assert said[:, inputs["input_ids"].shape[1] :].tolist() == [guarded.refusal] * 4


@pytest.mark.xdist_group("llava")
@torch.no_grad()
def test_a_state_that_is_not_finite_is_refused(guard: Guards) -> None:
    """P(unsafe) is NaN then, which no threshold allows; the rest of the batch is answered."""
    guarded = guard("llava")
    inputs = guarded.batch(count=3)
    inputs["pixel_values"][0] = float("inf")
    with guarded.at(0.999):
        output = guarded.model(**inputs)
    assert output.unsafe_probability.isnan().tolist() == [True, False, False]
    assert (output.logits[:, -1].argmax(dim=-1) == guarded.refusal[0]).tolist() == [True, False, False]
