"""The patched models against the oracle (two full passes, probe on whole logits) and the stock models."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from conftest import Guard
from torch import Tensor

from sasa_export.models.family import family_of

Guards = Callable[..., Guard]

TOLERANCE = 1e-5
TOKENS = 20

# One worker per family, so that its models are built once.
FAMILIES = [pytest.param(family, marks=pytest.mark.xdist_group(family)) for family in tiny.FAMILIES]
every_family = pytest.mark.parametrize("family", FAMILIES)
with_images = pytest.mark.parametrize("images", [False, True], ids=["text", "images"])
both_sides = pytest.mark.parametrize("padding_side", ["left", "right"])


def batch(
    guard: Guard, *, images: bool = True, padding_side: Any = "left", count: int = 4, seed: int = 1
) -> dict[str, Any]:
    """Prompts of different lengths; with `images`, some rows still have none."""
    return dict(tiny.prompts(guard.processor, images=images, count=count, seed=seed, padding_side=padding_side))


def differs(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two tensors of one shape."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


@contextmanager
def seen_outputs(model: Any) -> Iterator[list[Any]]:
    """The outputs of every forward pass of `model` within the block."""
    outputs: list[Any] = []
    handle = model.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


@contextmanager
def counted(model: Any, paths: list[str]) -> Iterator[Counter[str]]:
    """How often each of the modules at `paths` runs within the block."""
    calls: Counter[str] = Counter()

    def count(path: str) -> Callable[..., None]:
        return lambda module, args: calls.update([path])

    handles = [model.get_submodule(path).register_forward_pre_hook(count(path)) for path in paths]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@every_family
@with_images
@both_sides
@pytest.mark.parametrize(("count", "seed"), [(1, 5), (4, 1), (7, 2)])
@torch.no_grad()
def test_probability_is_the_oracles(
    guard: Guards, family: str, images: bool, padding_side: str, count: int, seed: int
) -> None:
    """P(unsafe) of every row, with and without a cache."""
    guarded = guard(family)
    inputs = batch(guarded, images=images, padding_side=padding_side, count=count, seed=seed)
    expected = guarded.expected(inputs)  # (batch,)
    for use_cache in (True, False):
        found = guarded.model(**inputs, use_cache=use_cache).unsafe_probability  # (batch,)
        assert found.dtype == torch.float32
        assert differs(found, expected) <= TOLERANCE
    if count > 1:
        assert expected.std() > 0.01, "the rows of this batch should not score alike"


@every_family
@both_sides
@pytest.mark.parametrize(("safety", "semantic"), [(0, 1), (0, 5), (1, 3), (4, 5)])
@torch.no_grad()
def test_probability_at_other_layers(guard: Guards, family: str, padding_side: str, safety: int, semantic: int) -> None:
    """The first and the last block can be the safety and the semantic layer, and they can be neighbours."""
    guarded = guard(family, safety, semantic)
    inputs = batch(guarded, padding_side=padding_side, count=5, seed=3)
    found = guarded.model(**inputs).unsafe_probability  # (batch,)
    assert differs(found, guarded.expected(inputs)) <= TOLERANCE
    other = guard(family).expected(inputs)  # (batch,)
    assert differs(found, other) > 100 * TOLERANCE, "other layers should score otherwise"


@every_family
@with_images
@both_sides
@torch.no_grad()
def test_forward_gates_the_logits(guard: Guards, family: str, images: bool, padding_side: str) -> None:
    """Allowed rows keep their logits to the bit; refused rows say the refusal's first token next."""
    guarded = guard(family)
    inputs = batch(guarded, images=images, padding_side=padding_side)
    expected = guarded.stock(**inputs).logits  # (batch, tokens, vocabulary)
    with guarded.halved(inputs) as refused:
        found = guarded.model(**inputs)
    assert differs(found.unsafe_probability, guarded.expected(inputs)) <= TOLERANCE
    assert refused.any() and not refused.all()
    assert torch.equal(found.logits[~refused], expected[~refused])
    mask = inputs["attention_mask"]  # (batch, tokens)
    last = (mask * torch.arange(mask.shape[1])).argmax(dim=1)  # (batch,)
    for row in refused.nonzero()[:, 0].tolist():
        end = int(last[row])
        assert torch.equal(found.logits[row, :end], expected[row, :end])
        said = found.logits[row, end:].argmax(dim=-1)  # (positions from the last prompt token on,)
        assert (said == guarded.refusal[0]).all()


@every_family
@with_images
@both_sides
@torch.no_grad()
def test_generate_says_what_the_original_says(guard: Guards, family: str, images: bool, padding_side: str) -> None:
    """Twenty greedy tokens: allowed rows those of stock `generate`, refused rows the refusal and its end."""
    guarded = guard(family)
    assert len(guarded.refusal) < TOKENS
    inputs = batch(guarded, images=images, padding_side=padding_side)
    prompt = inputs["input_ids"].shape[1]
    expected = guarded.stock.generate(**inputs, max_new_tokens=TOKENS)[:, prompt:]  # (batch, up to TOKENS)
    with guarded.halved(inputs) as refused, seen_outputs(guarded.model) as outputs:
        found = guarded.model.generate(**inputs, max_new_tokens=TOKENS)[:, prompt:]
    assert differs(outputs[0].unsafe_probability, guarded.expected(inputs)) <= TOLERANCE
    assert all(bool(output.unsafe_probability.isnan().all()) for output in outputs[1:])
    assert len({tuple(row) for row in expected.tolist()}) == len(expected)
    for row, answer in enumerate(found.tolist()):
        if refused[row]:
            spelled = len(guarded.refusal)
            assert answer[:spelled] == guarded.refusal
            assert set(answer[spelled:]) <= guarded.ends
        else:
            said = expected[row].tolist()
            both = min(len(answer), len(said))
            assert answer[:both] == said[:both]
            # A row that ends early is padded for as long as others of its batch still speak.
            assert set(answer[both:] + said[both:]) <= guarded.ends


@every_family
@torch.no_grad()
def test_refused_text_spells_the_whole_refusal(guard: Guards, family: str) -> None:
    """A refusal longer than the usual answers comes out whole, and reads as it was given."""
    refusal = "I'm sorry, but I cannot help with that request."
    guarded = guard(family, refusal=refusal)
    inputs = batch(guarded, count=2)
    with guarded.at(1e-6):
        answers = guarded.model.generate(**inputs, max_new_tokens=60)  # (batch, tokens)
    answers = answers[:, inputs["input_ids"].shape[1] :]
    assert guarded.processor.batch_decode(answers, skip_special_tokens=True) == [refusal, refusal]


@every_family
@both_sides
@torch.no_grad()
def test_cache_holds_the_main_lane(guard: Guards, family: str, padding_side: str) -> None:
    """After the prompt and after a token, the cache is the stock model's, with the ledger behind it."""
    guarded = guard(family)
    inputs = batch(guarded, padding_side=padding_side)
    tokens = inputs["input_ids"].shape[1]
    with guarded.halved(inputs) as refused:
        found = guarded.model(**inputs, use_cache=True).past_key_values
        expected = guarded.stock(**inputs, use_cache=True).past_key_values
        same_layers(found, expected)
        state = found.layers[tiny.LAYERS].keys[:, 0, -1, 0]  # (batch,)
        assert found.get_seq_length(tiny.LAYERS) == tokens
        assert torch.equal(state > 0, refused)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)  # (batch, tokens + 1)
        step = {
            "input_ids": torch.tensor([[65], [66], [67], [68]]),
            "attention_mask": mask,
            "position_ids": inputs["attention_mask"].sum(dim=1, keepdim=True),  # (batch, 1)
        }
        after = guarded.model(**step, past_key_values=found)
        plain = guarded.stock(**step, past_key_values=expected)
    same_layers(found, expected)
    assert found.get_seq_length(tiny.LAYERS) == tokens + 1
    assert after.unsafe_probability.isnan().all()
    assert torch.equal(after.logits[~refused], plain.logits[~refused])
    assert (after.logits[refused, -1].argmax(dim=-1) == guarded.refusal[1]).all()


def same_layers(found: Any, expected: Any) -> None:
    """Assert that `found` has the layers of `expected`, to the bit, and more of the same shape behind them."""
    assert len(expected.layers) == tiny.LAYERS
    assert len(found.layers) > tiny.LAYERS
    for own, stock in zip(found.layers, expected.layers, strict=False):
        assert torch.equal(own.keys, stock.keys)
        assert torch.equal(own.values, stock.values)
    full = max(expected.layers, key=lambda layer: layer.keys.shape[2])
    for extra in found.layers[tiny.LAYERS :]:
        assert extra.keys.shape[:2] == full.keys.shape[:2] and extra.keys.shape[3] == full.keys.shape[3]


@every_family
@torch.no_grad()
def test_each_module_runs_as_often_as_it_must(guard: Guards, family: str) -> None:
    """The vision tower and blocks 0..s run once over the prompt, the others twice, and all once per token."""
    guarded = guard(family)
    modules = family_of(guarded.stock.config.model_type).modules
    blocks = [f"{modules['blocks']}.{index}" for index in range(tiny.LAYERS)]
    paths = [modules["vision"], modules["projector"], modules["embedding"], modules["head"], *blocks]
    inputs = batch(guarded)
    with guarded.halved(inputs), counted(guarded.stock, paths) as stock_calls:
        guarded.stock(**inputs)
    with guarded.halved(inputs), counted(guarded.model, paths) as calls:
        guarded.model(**inputs)
    for path in paths:
        again = path in blocks[guarded.safety + 1 :]
        assert calls[path] == stock_calls[path] + again, path
    assert calls[modules["vision"]] == 1
    with guarded.halved(inputs), counted(guarded.model, paths) as calls:
        answers = guarded.model.generate(**inputs, max_new_tokens=4, min_new_tokens=4)
    assert answers.shape[1] == inputs["input_ids"].shape[1] + 4
    for index, path in enumerate(blocks):
        assert calls[path] == (2 if index > guarded.safety else 1) + 3, path
    assert calls[modules["vision"]] == 1
    text = batch(guarded, images=False)
    with counted(guarded.model, paths) as calls:
        guarded.model(**text)
    assert calls[modules["vision"]] == 0


@pytest.mark.xdist_group("llava")
@torch.no_grad()
def test_two_guards_take_turns(guard: Guards) -> None:
    """Models with other layers and of other families answer in turn, each by its own gate."""
    guards = [guard("llava"), guard("llava", 0, 5), guard("gemma3")]
    for _ in range(2):
        for guarded in guards:
            inputs = batch(guarded, count=3)
            found = guarded.model(**inputs).unsafe_probability  # (batch,)
            assert differs(found, guarded.expected(inputs)) <= TOLERANCE


@every_family
@torch.no_grad()
def test_one_prompt_without_a_mask(guard: Guards, family: str) -> None:
    """Where nothing is padded, the attention mask may be left out."""
    guarded = guard(family)
    inputs = batch(guarded, count=1)
    expected = guarded.expected(inputs)  # (1,)
    found = guarded.model(**without(inputs, "attention_mask")).unsafe_probability  # (1,)
    assert differs(found, expected) <= TOLERANCE


def without(inputs: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """`inputs` but for some of them."""
    return {name: value for name, value in inputs.items() if name not in names}


FRESH = """
import json, sys
import torch
from transformers import AutoModelForImageTextToText
torch.set_num_threads(1)
found = []
for directory, batch, threshold in json.loads(sys.argv[1]):
    model = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True).eval()
    model.config.sasa["threshold"] = threshold
    inputs = torch.load(batch)
    with torch.no_grad():
        probability = model(**inputs).unsafe_probability.tolist()
        answers = model.generate(**inputs, max_new_tokens=12)[:, inputs["input_ids"].shape[1]:].tolist()
    found.append([type(model).__module__.split(".")[0], probability, answers])
assert "sasa_export" not in sys.modules
print(json.dumps(found))
"""


@pytest.mark.xdist_group("llava")
@torch.no_grad()
def test_a_fresh_process_agrees(guard: Guards, fresh: Callable[..., Any], tmp_path: Any) -> None:
    """All families in one process by the code in their directories, where nothing of ours is imported."""
    guards = [guard(family) for family in tiny.FAMILIES]
    jobs, expected = [], []
    for guarded in guards:
        inputs = batch(guarded, count=4)
        torch.save(inputs, tmp_path / f"{guarded.family}.pt")
        with guarded.halved(inputs):
            threshold = guarded.model.config.sasa["threshold"]
            answers = guarded.model.generate(**inputs, max_new_tokens=12)[:, inputs["input_ids"].shape[1] :]
        jobs.append([str(guarded.directory), str(tmp_path / f"{guarded.family}.pt"), threshold])
        expected.append((guarded.expected(inputs), answers.tolist()))
    found = fresh(FRESH, jobs)
    for (module, probability, answers), (wanted, said) in zip(found, expected, strict=True):
        assert module == "transformers_modules"
        assert differs(torch.tensor(probability), wanted) <= TOLERANCE
        assert answers == said
