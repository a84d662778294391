"""`--projection none`: the probe reads the end of the main lane, and there is no second one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import oracle
import pytest
import tiny
import torch
from conftest import Guard
from onnx_runner import Runner, image_token, positions
from torch import Tensor

Guards = Callable[..., Guard]

FAMILIES = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ("llava", "gemma3", "qwen2_5_vl")]
every_family = pytest.mark.parametrize("family", FAMILIES)


class PlainGuard(Guard):
    """A tiny model whose probe reads the main lane."""

    def expected(self, inputs: Any) -> Tensor:
        """P(unsafe) of each row (batch,), by a plain pass of the stock model."""
        return oracle.unsafe_probability(oracle.plain_logits(self.stock, inputs), self.weight, self.bias)


def without_projection(guard: Guards, family: str) -> Guard:
    plain = guard(family, None, None, projection="none")
    return PlainGuard(**{entry.name: getattr(plain, entry.name) for entry in fields(Guard)})


def batch(guarded: Guard, **options: Any) -> dict[str, Any]:
    given = {"images": True, "count": 4, "seed": 4, "padding_side": "left", **options}
    return dict(tiny.prompts(guarded.processor, **given))


def answers(model: Any, inputs: dict[str, Any]) -> Tensor:
    """(batch, tokens)."""
    said: Tensor = model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return said


def blocks_run(model: Any, inputs: dict[str, Any]) -> list[int]:
    """How often each block runs over a prompt."""
    calls: Counter[str] = Counter()
    paths = [node["module"] for node in model.config.sasa["graph"] if node["op"] == "block"]
    handles = [
        model.get_submodule(path).register_forward_pre_hook(lambda module, args, path=path: calls.update([path]))
        for path in paths
    ]
    model(**inputs)
    for handle in handles:
        handle.remove()
    return [calls[path] for path in paths]


@every_family
@torch.no_grad()
def test_the_verdict_is_the_oracles(guard: Guards, family: str) -> None:
    """Refused rows emit the refusal, allowed ones are the stock model's to the bit, and no block runs in vain."""
    guarded = without_projection(guard, family)
    inputs = batch(guarded)
    expected = guarded.expected(inputs)  # (batch,)
    assert (expected - guard(family).expected(inputs)).abs().max() > 1e-3, "the oracle must see the difference"
    with guarded.halved(inputs) as refused:
        found = guarded.model(**inputs)
        said, plain = answers(guarded.model, inputs), answers(guarded.stock, inputs)
    torch.testing.assert_close(found.unsafe_probability, expected, rtol=0.0, atol=1e-5)
    assert refused.any() and not refused.all()
    assert torch.equal(found.logits[~refused], guarded.stock(**inputs).logits[~refused])
    assert all(row.tolist() == guarded.refusal[: len(row)] for row in said[refused])
    width = min(said.shape[1], plain.shape[1])
    assert torch.equal(said[~refused, :width], plain[~refused, :width])
    assert blocks_run(guarded.model, inputs) == [1] * tiny.LAYERS


@every_family
@torch.no_grad()
def test_a_prompt_that_comes_token_by_token(guard: Guards, family: str) -> None:
    guarded = without_projection(guard, family)
    inputs = batch(guarded, images=False, count=1)
    places, _ = positions(guarded, inputs)  # (..., 1, tokens)
    cache, found = None, None
    for place in range(inputs["input_ids"].shape[1]):
        piece = {"input_ids": inputs["input_ids"][:, place : place + 1], "position_ids": places[..., place : place + 1]}
        found = guarded.model(**piece, past_key_values=cache, use_cache=True)
        cache = found.past_key_values
    assert found is not None
    torch.testing.assert_close(found.unsafe_probability, guarded.expected(inputs), rtol=0.0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.xdist_group("onnx-llava")
@torch.no_grad()
def test_in_onnx(guard: Guards, exported: Callable[..., Path]) -> None:
    guarded = without_projection(guard, "llava")
    directory = exported(guarded.directory)
    runner, inputs = Runner(directory), batch(guarded)
    ids, _ = positions(guarded, inputs)
    runner.prompt({name: value.numpy() for name, value in inputs.items()}, image_token(guarded), ids.numpy())
    assert runner.probability is not None
    np.testing.assert_allclose(runner.probability, guarded.expected(inputs).numpy(), atol=1e-4, rtol=0)
    graph = ir.load(directory / "onnx" / "decoder_model_merged.onnx").graph
    attentions = sum(node.op_type == "Attention" for node in graph.all_nodes())
    assert attentions == tiny.LAYERS


def test_the_card_says_what_it_costs(guard: Guards) -> None:
    card = " ".join((without_projection(guard, "llava").directory / "README.md").read_text().split())
    for words in ("Over the prompt 6 blocks run, as in the original", "No projection, so no layers to choose"):
        assert words in card
