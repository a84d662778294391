"""The patched models against the oracle and the stock models, beyond what test_families tries of each family."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import oracle
import pytest
import tiny
import torch
from conftest import Guard
from feeding import feed
from onnx_runner import Runner

from sasa_export.models.family import family_of
from sasa_export.runtime.formulas import project

Guards = Callable[..., Guard]
Layers = tuple[int, int] | None  # None: `--projection none`, where the probe reads the end of the main lane

TOLERANCE = 1e-5


def cases(*layers: Layers) -> list[Any]:
    """Each family with each pair of layers; the fast run tries LLaVA."""
    return [
        pytest.param(family, each, marks=[pytest.mark.slow] * (family != "llava"))
        for family in tiny.FAMILIES
        for each in layers
    ]


def guarded_with(guard: Guards, family: str, layers: Layers) -> Guard:
    return guard(family, *layers) if layers else guard(family, projection="none")


@pytest.mark.parametrize(("family", "layers"), cases((0, 1), (0, 5), (4, 5), None))
@torch.no_grad()
def test_other_layers(guard: Guards, family: str, layers: Layers) -> None:
    """The first and the last block can be the layers, they can be neighbours, and there can be none."""
    guarded = guarded_with(guard, family, layers)
    for padding_side in ("left", "right"):
        inputs = guarded.batch(padding_side=padding_side)
        scores = guarded.expected(inputs)  # (batch,)
        assert (scores - guard(family).expected(inputs)).abs().max() > 100 * TOLERANCE, "others should score otherwise"
        with guarded.halved(inputs) as refused:
            found = guarded.model(**inputs)
        torch.testing.assert_close(found.unsafe_probability, scores, rtol=0.0, atol=TOLERANCE)
        assert torch.equal(found.logits[~refused], guarded.stock(**inputs).logits[~refused])
        assert (found.logits[refused, -1].argmax(dim=-1) == guarded.refusal[0]).all()
    alone = guarded.batch(images=False, count=1)
    found = feed(guarded, alone, [*range(1, alone["input_ids"].shape[1] + 1)])
    torch.testing.assert_close(found.unsafe_probability, guarded.expected(alone), rtol=0.0, atol=TOLERANCE)


@contextmanager
def counted(model: Any, paths: list[str]) -> Iterator[Counter[str]]:
    """How often each of the modules at `paths` runs within the block."""
    calls: Counter[str] = Counter()
    handles = [
        model.get_submodule(path).register_forward_pre_hook(lambda module, args, path=path: calls.update([path]))
        for path in paths
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(("family", "layers"), cases((2, 4), None))
@torch.no_grad()
def test_each_module_runs_as_often_as_it_must(guard: Guards, family: str, layers: Layers) -> None:
    """Vision tower and blocks 0..s run once over the prompt, the others twice; all blocks once per token."""
    guarded = guarded_with(guard, family, layers)
    modules = family_of(family).modules
    blocks = [f"{modules['blocks']}.{index}" for index in range(tiny.LAYERS)]
    again = Counter(blocks[layers[0] + 1 :] if layers else ())
    paths = [modules["vision"], modules["projector"], modules["embedding"], modules["head"], *blocks]
    inputs = guarded.batch()
    with counted(guarded.stock, paths) as expected:
        guarded.stock(**inputs)
    with counted(guarded.model, paths) as calls:
        guarded.model(**inputs)
    assert calls == expected + again
    with guarded.halved(inputs), counted(guarded.model, [modules["vision"], *blocks]) as calls:
        guarded.model.generate(**inputs, max_new_tokens=4, min_new_tokens=4)
    assert calls == Counter({modules["vision"]: 1} | dict.fromkeys(blocks, 4)) + again


OPTIONS: dict[str, dict[str, Any]] = {
    "hidden states": {"output_hidden_states": True},
    "the last logits": {"logits_to_keep": 1},
    "some logits": {"logits_to_keep": 3},
    "the last logits, as a slice": {"logits_to_keep": slice(-2, None)},
    "no cache": {"use_cache": False},
    "a tuple": {"return_dict": False},
}


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_options_of_the_forward_pass(guard: Guards, padding_side: str, name: str) -> None:
    """The output is the stock model's in allowed rows, and forced in refused ones at their last prompt token.

    Under either padding, the last column lies at or behind that token.
    """
    guarded, options = guard("llava"), OPTIONS[name]
    inputs = guarded.batch(padding_side=padding_side)
    expected = guarded.stock(**inputs, **options)
    with guarded.halved(inputs) as refused:
        found = guarded.model(**inputs, **options)
    assert isinstance(found, tuple) == isinstance(expected, tuple)
    assert torch.equal(found[0][~refused], expected[0][~refused])  # (batch, kept, vocabulary)
    assert (found[0][refused, -1].argmax(dim=-1) == guarded.refusal[0]).all()
    if name == "hidden states":
        assert all(torch.equal(*pair) for pair in zip(found.hidden_states, expected.hidden_states, strict=True))


@torch.no_grad()
def test_gradient_checkpointing_and_autocast(guard: Guards) -> None:
    """A copy in training mode, and a model under autocast, judge and refuse too."""
    guarded = guard("llava")
    inputs = guarded.batch()
    expected = guarded.expected(inputs)  # (batch,)
    twin = copy.deepcopy(guarded.model).train()
    twin.gradient_checkpointing_enable()
    with guarded.at(1e-6, twin):
        output = twin(**inputs)
    torch.testing.assert_close(output.unsafe_probability, expected, rtol=0.0, atol=TOLERANCE)
    assert (output.logits[:, -1].argmax(dim=-1) == guarded.refusal[0]).all()
    with guarded.at(1e-6), torch.autocast("cpu", dtype=torch.bfloat16):
        found = guarded.model(**inputs).unsafe_probability  # (batch,)
        said = guarded.model.generate(**inputs, max_new_tokens=len(guarded.refusal))
    assert found.dtype == torch.float32 and (found - expected).abs().max() < 0.2
    assert said[:, inputs["input_ids"].shape[1] :].tolist() == [guarded.refusal] * 4


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


@pytest.mark.slow
@pytest.mark.xdist_group("onnx-llava")
@torch.no_grad()
def test_no_projection_in_onnx_and_on_the_card(guard: Guards, exported: Callable[..., Path]) -> None:
    """No block runs in vain, and README says so."""
    guarded = guard("llava", projection="none")
    directory = exported(guarded.directory)
    runner, inputs = Runner(directory), guarded.batch()
    runner.ask(guarded, inputs)
    np.testing.assert_allclose(runner.probability, guarded.expected(inputs).numpy(), atol=1e-4, rtol=0)
    graph = ir.load(directory / "onnx" / "decoder_model_merged.onnx").graph
    assert sum(node.op_type == "Attention" for node in graph.all_nodes()) == tiny.LAYERS
    card = " ".join((guarded.directory / "README.md").read_text().split())
    for words in ("Over the prompt 6 blocks run, as in the original", "No projection, so no layers to choose"):
        assert words in card


def test_projection() -> None:
    """The oracle's, also where a semantic state is zero, and in half precision where its norm overflows."""
    safety, semantic = torch.randn(2, 3, 5, 4096, generator=torch.Generator().manual_seed(0))
    semantic[0, 0] = 0.0
    torch.testing.assert_close(project(safety, semantic, 1e-6), oracle.project(safety, semantic, 1e-6))
    assert torch.equal(project(safety, semantic, 1e-6)[0, 0], torch.zeros(4096))
    half = 300 * torch.ones(1, 1, 4096, dtype=torch.float16)
    assert torch.equal(project(half, half, 1e-6), half)
