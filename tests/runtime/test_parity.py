"""The patched models against the oracle and the stock models, beyond what test_families tries of each family."""

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


def case(family: str, layers: Layers, slow: bool = False) -> Any:
    """One worker a family, so that its models are built once."""
    return pytest.param(family, layers, marks=[pytest.mark.xdist_group(family), *[pytest.mark.slow] * slow])


def guarded_with(guard: Guards, family: str, layers: Layers) -> Guard:
    return guard(family, *layers) if layers else guard(family, projection="none")


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        case(family, layers, slow=(row - column) % 3 != 0)
        for row, family in enumerate(tiny.FAMILIES)
        for column, layers in enumerate([(0, 1), (0, 5), (4, 5), None])
    ],
)
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


@pytest.mark.parametrize(("family", "layers"), [*(case(name, (2, 4)) for name in tiny.FAMILIES), case("llava", None)])
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
