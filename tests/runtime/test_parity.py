"""The patched models against the oracle and the stock models, beyond what test_families tries of each family."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import oracle
import pytest
import tiny
import torch
from conftest import Guard
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from sasa_export.graph.rewrite import LaneSettings, rewrite
from sasa_export.graph.trace import trace
from sasa_export.models.family import family_of
from sasa_export.runtime.formulas import project
from sasa_export.runtime.guard import Probe
from sasa_export.runtime.lane import Recording, current_recording, run_lane, start, watch, within

Guards = Callable[..., Guard]

TOLERANCE = 1e-5
TOKENS = 20

slow = pytest.mark.slow
# One worker per family, so that its models are built once.
FAMILIES = [pytest.param(family, marks=pytest.mark.xdist_group(family)) for family in tiny.FAMILIES]
every_family = pytest.mark.parametrize("family", FAMILIES)
with_images = pytest.mark.parametrize("images", [True, pytest.param(False, marks=slow)], ids=["images", "text"])
both_sides = pytest.mark.parametrize("padding_side", ["left", "right"])


def differs(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two tensors of one shape."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        pytest.param(
            family, layers, marks=[pytest.mark.xdist_group(family), *([] if (row - column) % 3 == 0 else [slow])]
        )
        for row, family in enumerate(tiny.FAMILIES)
        for column, layers in enumerate([(0, 1), (0, 5), (4, 5)])
    ],
)
@torch.no_grad()
def test_other_layers(guard: Guards, family: str, layers: tuple[int, int]) -> None:
    """The first and the last block can be the safety and the semantic layer, and they can be neighbours."""
    guarded = guard(family, *layers)
    for padding_side in ("left", "right"):
        inputs = guarded.batch(padding_side=padding_side)
        scores = guarded.expected(inputs)  # (batch,)
        assert differs(scores, guard(family).expected(inputs)) > 100 * TOLERANCE, "other layers should score otherwise"
        with guarded.halved(inputs) as refused:
            found = guarded.model(**inputs)
        assert differs(found.unsafe_probability, scores) <= TOLERANCE
        assert torch.equal(found.logits[~refused], guarded.stock(**inputs).logits[~refused])
        assert (found.logits[refused, -1].argmax(dim=-1) == guarded.refusal[0]).all()


@every_family
@with_images
@both_sides
@torch.no_grad()
def test_generate_says_what_the_original_says(guard: Guards, family: str, images: bool, padding_side: str) -> None:
    """Twenty greedy tokens: allowed rows those of stock `generate`, refused rows the refusal, and one verdict."""
    guarded = guard(family)
    assert len(guarded.refusal) < TOKENS
    inputs = guarded.batch(images=images, padding_side=padding_side)
    prompt = inputs["input_ids"].shape[1]
    expected = guarded.stock.generate(**inputs, max_new_tokens=TOKENS)[:, prompt:]  # (batch, up to TOKENS)
    assert len({tuple(row) for row in expected.tolist()}) == len(expected)
    outputs: list[Any] = []
    handle = guarded.model.register_forward_hook(lambda module, args, output: outputs.append(output))
    with guarded.halved(inputs) as refused:
        found = guarded.model.generate(**inputs, max_new_tokens=TOKENS)[:, prompt:]
    handle.remove()
    assert differs(outputs[0].unsafe_probability, guarded.expected(inputs)) <= TOLERANCE
    assert all(bool(output.unsafe_probability.isnan().all()) for output in outputs[1:])
    guarded.check_answers(found, expected, refused)
    said = guarded.processor.batch_decode(found[refused], skip_special_tokens=True)
    assert said == ["I will not help."] * 2


@every_family
@both_sides
@torch.no_grad()
def test_cache_holds_the_main_lane(guard: Guards, family: str, padding_side: str) -> None:
    """After the prompt and after a token, the cache is the stock model's to the bit, with the ledger behind it."""
    guarded = guard(family)
    inputs = guarded.batch(padding_side=padding_side)
    step = {
        "input_ids": torch.tensor([[65], [66], [67], [68]]),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1),  # (batch, tokens + 1)
        "position_ids": inputs["attention_mask"].sum(dim=1, keepdim=True),  # (batch, 1)
    }
    with guarded.halved(inputs) as refused:
        found, expected = guarded.model(**inputs), guarded.stock(**inputs)
        assert torch.equal(found.past_key_values.layers[tiny.LAYERS].keys[:, 0, -1, 0] > 0, refused)
        found = guarded.model(**step, past_key_values=found.past_key_values)
        expected = guarded.stock(**step, past_key_values=expected.past_key_values)
    assert found.unsafe_probability.isnan().all()
    assert torch.equal(found.logits[~refused], expected.logits[~refused])
    assert (found.logits[refused, -1].argmax(dim=-1) == guarded.refusal[1]).all()
    own, stock = found.past_key_values.layers, expected.past_key_values.layers
    assert len(own) > len(stock) == tiny.LAYERS
    for one, other in zip(own, stock, strict=False):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
    assert all(layer.keys.shape[2] == inputs["input_ids"].shape[1] + 1 for layer in own[tiny.LAYERS :])


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


@every_family
@torch.no_grad()
def test_each_module_runs_as_often_as_it_must(guard: Guards, family: str) -> None:
    """Vision tower and blocks 0..s run once over the prompt, the others twice; all blocks once per token."""
    safety = 2
    guarded = guard(family, safety)
    modules = family_of(guarded.stock.config.model_type).modules
    blocks = [f"{modules['blocks']}.{index}" for index in range(tiny.LAYERS)]
    paths = [modules["vision"], modules["projector"], modules["embedding"], modules["head"], *blocks]
    inputs = guarded.batch()
    with counted(guarded.stock, paths) as expected:
        guarded.stock(**inputs)
    with counted(guarded.model, paths) as calls:
        guarded.model(**inputs)
    assert calls == expected + Counter(blocks[safety + 1 :])
    with guarded.halved(inputs), counted(guarded.model, [modules["vision"], *blocks]) as calls:
        guarded.model.generate(**inputs, max_new_tokens=4, min_new_tokens=4)
    assert calls == Counter({modules["vision"]: 1} | dict.fromkeys(blocks, 4)) + Counter(blocks[safety + 1 :])


@pytest.mark.xdist_group("llava")
@torch.no_grad()
def test_two_guards_take_turns(guard: Guards) -> None:
    """Models with other layers and of other families answer in turn, each by its own gate."""
    guards = [guard("llava"), guard("llava", 0, 5), guard("gemma3")]
    for guarded in guards * 2:
        inputs = guarded.batch(count=3)
        assert differs(guarded.model(**inputs).unsafe_probability, guarded.expected(inputs)) <= TOLERANCE


def test_projection() -> None:
    """The oracle's, also where a semantic state is zero, and in half precision where its norm overflows."""
    safety, semantic = torch.randn(2, 3, 5, 4096, generator=torch.Generator().manual_seed(0))
    semantic[0, 0] = 0.0
    torch.testing.assert_close(project(safety, semantic, 1e-6), oracle.project(safety, semantic, 1e-6))
    assert torch.equal(project(safety, semantic, 1e-6)[0, 0], torch.zeros(4096))
    half = 300 * torch.ones(1, 1, 4096, dtype=torch.float16)
    assert torch.equal(project(half, half, 1e-6), half)


class Capped(LlavaForConditionalGeneration):
    """LLaVA with a soft cap on its logits, as some Gemma models have."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = torch.tanh(output.logits / 2.0) * 2.0  # (batch, kept, vocabulary)
        return output


@both_sides
@torch.no_grad()
def test_the_probe_reads_capped_logits(
    tiny_model: Callable[..., Any], stock: Callable[..., tuple[Any, Any]], padding_side: Any
) -> None:
    """Where something non-linear follows the head, the lane has a head too, and the probe reads its logits."""
    model = Capped.from_pretrained(tiny_model("llava")).eval()
    inputs = tiny.prompts(stock("llava")[1], images=True, count=4, seed=1, padding_side=padding_side)
    graph = rewrite(trace(model, family_of("llava"), dict(inputs)), LaneSettings(2, 4, softcap=2.0)).to_json()
    weight = torch.randn(model.config.text_config.vocab_size, generator=torch.Generator().manual_seed(1)) / 10
    model.sasa = torch.nn.Module()
    model.sasa.probe = Probe(len(weight))
    model.sasa.probe.weight.copy_(weight)
    model.sasa.probe.bias.fill_(0.2)
    watch(model, graph)
    with within(current_recording, Recording()) as seen:
        model(**inputs)
    node, states = start(graph, seen)  # (batch, tokens, hidden)
    found = run_lane(model, graph, {node: states}, seen.arguments, oracle.last_positions(inputs))[
        "sasa.probe"
    ]  # (batch,)
    logits, plain = (oracle.oracle_logits(one, inputs, 2, 4) for one in (model, stock("llava")[0]))
    expected = oracle.unsafe_probability(logits, weight, 0.2)  # (batch,)
    assert differs(found, expected) <= TOLERANCE
    assert differs(expected, oracle.unsafe_probability(plain, weight, 0.2)) > 1e-3, "the cap should matter"
