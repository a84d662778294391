"""`--gate every-token`: the second lane runs beside the main lane and judges each token, by the oracle."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from conftest import Guard
from test_feeding import chunkings, feed, last_picture_token

Guards = Callable[..., Guard]

STEPS = 12
FAMILIES = [pytest.param(family, marks=pytest.mark.xdist_group(family)) for family in tiny.FAMILIES]
every_family = pytest.mark.parametrize("family", FAMILIES)


def batch(guarded: Guard, *, images: bool = True, count: int = 3, seed: int = 4, side: Any = "left") -> dict[str, Any]:
    return dict(tiny.prompts(guarded.processor, images=images, count=count, seed=seed, padding_side=side))


@every_family
@pytest.mark.parametrize("images", [False, True], ids=["text", "images"])
@torch.no_grad()
def test_any_chunking(guard: Guards, family: str, images: bool) -> None:
    guarded = guard(family, gate="every-token")
    inputs = batch(guarded, images=images)
    expected = guarded.expected(inputs)  # (batch,)
    with guarded.at(2.0):  # nothing is refused on the way
        for ends in chunkings(inputs["input_ids"].shape[1], last_picture_token(guarded, inputs), seed=1)[:6]:
            found = feed(guarded, inputs, ends).unsafe_probability  # (batch,)
            torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5)


@every_family
@torch.no_grad()
def test_each_token_of_an_answer(guard: Guards, family: str) -> None:
    """P(unsafe) of each step is the oracle's on the text so far, and an allowed answer is the stock model's."""
    guarded = guard(family, gate="every-token")
    inputs = batch(guarded, images=False)
    with guarded.at(2.0):
        output = guarded.model.generate(**inputs, max_new_tokens=STEPS, return_dict_in_generate=True, use_cache=True)
        plain = guarded.stock.generate(**inputs, max_new_tokens=STEPS)
    assert torch.equal(output.sequences, plain)
    probabilities = stepwise(guarded, inputs, plain)  # (batch, steps)
    for step in range(probabilities.shape[1]):
        end = inputs["input_ids"].shape[1] + step
        text = continued(inputs, plain[:, inputs["input_ids"].shape[1] : end])
        torch.testing.assert_close(probabilities[:, step], guarded.expected(text), rtol=0.0, atol=1e-5)


def continued(inputs: dict[str, Any], more: torch.Tensor) -> dict[str, Any]:
    """The prompt with more tokens (batch, tokens) behind it."""
    added = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    zeros = torch.zeros_like(more)
    return {name: torch.cat([value, added.get(name, zeros)], dim=1) for name, value in inputs.items()}


def stepwise(guarded: Guard, inputs: dict[str, Any], sequences: torch.Tensor) -> torch.Tensor:
    """P(unsafe) at the prompt's end and after each further token but the last: (batch, steps)."""
    start, cache, found = inputs["input_ids"].shape[1], None, []
    ids, mask = inputs["input_ids"], inputs["attention_mask"]  # (batch, tokens)
    for end in range(start, sequences.shape[1]):
        places = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]  # (batch, tokens)
        with guarded.at(2.0):
            output = guarded.model(
                input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True
            )
        found.append(output.unsafe_probability)
        cache, ids = output.past_key_values, sequences[:, end : end + 1]
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return torch.stack(found, dim=1)


@every_family
@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
@torch.no_grad()
def test_an_answer_that_turns_unsafe_is_refused_from_there(guard: Guards, family: str, cache: bool) -> None:
    guarded = guard(family, gate="every-token")
    inputs = batch(guarded, images=False)
    start = inputs["input_ids"].shape[1]
    plain = guarded.stock.generate(**inputs, max_new_tokens=STEPS, min_new_tokens=STEPS)
    scores = stepwise(guarded, inputs, plain)  # (batch, steps)
    threshold = float(scores[:, 3:].amax(dim=-1).min()) - 1e-4
    turned = 0
    with guarded.at(threshold):
        longer = STEPS + len(guarded.refusal)
        found = guarded.model.generate(**inputs, max_new_tokens=longer, use_cache=cache)
    for row, line in enumerate(scores):
        unsafe = (line >= threshold).nonzero()  # (positions, 1)
        first = int(unsafe[0]) if len(unsafe) else STEPS
        kept = found[row, start : start + first]
        if not len(unsafe) and int(plain[row, -1]) in guarded.ends:
            continue
        assert torch.equal(kept, plain[row, start : start + first])
        if len(unsafe):
            turned += first > 0
            rest = found[row, start + first :].tolist()
            assert rest[: len(guarded.refusal)] == guarded.refusal
    assert turned


@every_family
@torch.no_grad()
def test_a_static_cache_says_what_a_growing_one_says(guard: Guards, family: str) -> None:
    guarded = guard(family, gate="every-token")
    inputs = batch(guarded, count=4)
    with guarded.halved(inputs):
        expected = guarded.model.generate(**inputs, max_new_tokens=STEPS)
        found = guarded.model.generate(**inputs, max_new_tokens=STEPS, cache_implementation="static")
    assert torch.equal(found, expected)


def test_an_answer_may_end_in_the_refusal() -> None:
    from sasa_export.verify.check import cut_short

    assert cut_short([5, 6, 7, 8, 9], [5, 6, 1, 2, 3], [1, 2, 3, 4])
    assert cut_short([5, 6], [5, 6, 1, 2, 3, 4], [1, 2, 3, 4])
    assert cut_short([5, 1, 7], [5, 1, 2], [1, 2, 3, 4])
    assert not cut_short([5, 6, 7], [5, 1, 7], [1, 2, 3])
