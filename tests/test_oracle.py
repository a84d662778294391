"""The oracle judges the product; these tests judge the oracle, on every family and without the product."""

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import tiny
import torch
from transformers import BatchFeature, ProcessorMixin

# The model's own type declares far less than a model with a language head has.
Stock = Callable[..., tuple[Any, ProcessorMixin]]

SAFETY, SEMANTIC = 1, 3
TOLERANCE = 1e-4

every_family = pytest.mark.parametrize("family", tiny.FAMILIES)
with_images = pytest.mark.parametrize("images", [False, True], ids=["text", "images"])
both_sides = pytest.mark.parametrize("padding_side", ["left", "right"])


def batch(processor: ProcessorMixin, *, images: bool = True, padding_side: Any = "left") -> BatchFeature:
    """Four prompts of different lengths."""
    return tiny.prompts(processor, images=images, count=4, seed=1, padding_side=padding_side)


def single_rows(processor: ProcessorMixin, *, images: bool = True) -> list[BatchFeature]:
    """The prompts of `batch`, each encoded alone and without padding."""
    chats = tiny.conversations(images=images, count=4, seed=1)
    return [tiny.encode(processor, [chat]) for chat in chats]


@every_family
@with_images
def test_sasa_changes_the_logits(stock: Stock, family: str, images: bool) -> None:
    """The second lane reaches every row's logits, and each layer choice gives its own."""
    model, processor = stock(family)
    inputs = batch(processor, images=images)
    plain = oracle.plain_logits(model, inputs)  # (batch, vocabulary)
    one = oracle.oracle_logits(model, inputs, SAFETY, SEMANTIC)  # (batch, vocabulary)
    other = oracle.oracle_logits(model, inputs, SAFETY, SEMANTIC + 1)  # (batch, vocabulary)
    assert one.isfinite().all()
    for first, second in ((plain, one), (plain, other), (one, other)):
        assert ((first - second).abs().amax(dim=-1) > 0.1 * plain.std()).all()


@every_family
@with_images
@both_sides
def test_batch_rows_equal_single_rows(stock: Stock, family: str, images: bool, padding_side: str) -> None:
    """Padding on either side changes neither the plain logits nor SASA's."""
    model, processor = stock(family)
    inputs = batch(processor, images=images, padding_side=padding_side)
    lengths = inputs["attention_mask"].sum(dim=1)  # (batch,)
    assert lengths.unique().numel() > 1
    edge = 0 if padding_side == "left" else -1
    assert inputs["attention_mask"][:, edge].min() == 0
    plain = oracle.plain_logits(model, inputs)  # (batch, vocabulary)
    sasa = oracle.oracle_logits(model, inputs, SAFETY, SEMANTIC)  # (batch, vocabulary)
    for row, alone in enumerate(single_rows(processor, images=images)):
        assert alone["input_ids"].shape[1] == lengths[row]
        torch.testing.assert_close(oracle.plain_logits(model, alone)[0], plain[row], rtol=0.0, atol=TOLERANCE)
        torch.testing.assert_close(
            oracle.oracle_logits(model, alone, SAFETY, SEMANTIC)[0], sasa[row], rtol=0.0, atol=TOLERANCE
        )


@every_family
@both_sides
def test_own_state_changes_nothing(stock: Stock, family: str, padding_side: str) -> None:
    """When the replaced state is h_s itself, pass 2 is pass 1, whichever block it is."""
    model, processor = stock(family)
    inputs = batch(processor, padding_side=padding_side)
    seen = oracle.block_outputs(model, inputs, tuple(range(tiny.LAYERS)))
    plain = oracle.plain_logits(model, inputs)  # (batch, vocabulary)
    for layer, state in seen.items():
        assert torch.equal(oracle.logits_with_state(model, inputs, layer, state), plain)


@every_family
def test_hooks_see_the_blocks(stock: Stock, family: str) -> None:
    """Block i's output is hidden_states[i + 1]; for the last block, that is so before the final norm only."""
    model, processor = stock(family)
    inputs = batch(processor)
    assert len(oracle.blocks(model)) == tiny.LAYERS
    seen = oracle.block_outputs(model, inputs, tuple(range(tiny.LAYERS)))
    with torch.no_grad():
        states = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
    for layer in range(tiny.LAYERS - 1):
        assert torch.equal(seen[layer], states[layer + 1])
    norm = model.get_submodule(oracle.BLOCKS[family].replace(".layers", ".norm"))
    with torch.no_grad():
        normed = norm(seen[tiny.LAYERS - 1])  # (batch, tokens, hidden)
    assert not torch.allclose(seen[tiny.LAYERS - 1], states[tiny.LAYERS])
    assert torch.equal(normed, states[tiny.LAYERS])


@every_family
def test_last_layer_can_be_the_semantic_layer(stock: Stock, family: str) -> None:
    """The semantic layer may be the last one, whose state before and after the final norm differ."""
    model, processor = stock(family)
    inputs = batch(processor)
    with torch.no_grad():
        states = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
    normed = oracle.project(states[SAFETY + 1], states[tiny.LAYERS])  # (batch, tokens, hidden)
    wrong = oracle.logits_with_state(model, inputs, SAFETY, normed)  # (batch, vocabulary)
    right = oracle.oracle_logits(model, inputs, SAFETY, tiny.LAYERS - 1)  # (batch, vocabulary)
    assert not torch.allclose(right, wrong, rtol=0.0, atol=TOLERANCE)


@every_family
def test_folded_probe_equals_the_probe_on_logits(stock: Stock, family: str) -> None:
    """W_head^T w on the normed state scores as w does on the logits."""
    model, processor = stock(family)
    inputs = batch(processor)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(model.config.get_text_config().vocab_size, generator=generator)  # (vocabulary,)
    weight = weight / 20  # (vocabulary,)
    with torch.no_grad():
        states = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
    rows = torch.arange(4)  # (batch,)
    normed = states[-1][rows, oracle.last_positions(inputs)]  # (batch, hidden)
    folded = torch.sigmoid(normed @ oracle.folded(model, weight) + 0.3)  # (batch,)
    whole = oracle.unsafe_probability(oracle.plain_logits(model, inputs), weight, 0.3)  # (batch,)
    torch.testing.assert_close(folded, whole, rtol=0.0, atol=1e-5)
    assert whole.std() > 0.01


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_qwen_rows_keep_their_own_image_positions(stock: Stock, padding_side: str) -> None:
    """In a mixed batch, M-RoPE positions follow each row's own image grid, as if the row were alone."""
    model, processor = stock("qwen2_5_vl")
    inputs = batch(processor, padding_side=padding_side)
    grids = inputs["image_grid_thw"].tolist()
    assert len(set(map(tuple, grids))) > 1, "rows should differ in their grids"
    seen: list[torch.Tensor] = []

    def record(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"])  # (3, batch, tokens)

    handle = model.model.language_model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        sasa = oracle.oracle_logits(model, inputs, SAFETY, SEMANTIC)  # (batch, vocabulary)
        first, second = seen
        assert torch.equal(first, second)
        for row, alone in enumerate(single_rows(processor)):
            seen.clear()
            logits = oracle.oracle_logits(model, alone, SAFETY, SEMANTIC)  # (1, vocabulary)
            torch.testing.assert_close(logits[0], sasa[row], rtol=0.0, atol=TOLERANCE)
            real = inputs["attention_mask"][row].bool()  # (tokens,)
            if "image_grid_thw" in alone:
                assert torch.equal(first[:, row, real], seen[0][:, 0])
                time, height, width = first[:, row, real]  # each (tokens of the row,)
                assert not torch.equal(height, width) and not torch.equal(time, height)
            else:
                # A lone text prompt is numbered from 0 by the text model; rotation is relative.
                assert (first[:, row, real].diff(dim=-1) == 1).all()
    finally:
        handle.remove()


@every_family
@with_images
def test_greedy_equals_generate(stock: Stock, family: str, images: bool) -> None:
    """The hand-written loop says what stock `generate` says, from either padding, and varies by row."""
    model, processor = stock(family)
    left = batch(processor, images=images)
    prompt = left["input_ids"].shape[1]
    with torch.no_grad():
        expected = model.generate(**left, max_new_tokens=8)[:, prompt:]  # (batch, up to 8)
    found = oracle.greedy(model, left, tokens=8)  # (batch, 8)
    assert torch.equal(found[:, : expected.shape[1]], expected)
    assert len({tuple(row) for row in found.tolist()}) == 4
    right = batch(processor, images=images, padding_side="right")
    assert torch.equal(oracle.greedy(model, right, tokens=8), found)


def test_projection() -> None:
    """The projection is parallel to h_f, leaves a remainder across it, and survives a state of zeros."""
    generator = torch.Generator().manual_seed(0)
    safety, semantic = torch.randn(2, 3, 5, 8, generator=generator)  # each (batch, tokens, hidden)
    semantic[0, 0] = 0.0
    projected = oracle.project(safety, semantic)  # (batch, tokens, hidden)
    assert torch.equal(projected[0, 0], torch.zeros(8))
    across = ((safety - projected) * semantic).sum(dim=-1)  # (batch, tokens)
    torch.testing.assert_close(across, torch.zeros(3, 5), rtol=0.0, atol=1e-5)
    torch.testing.assert_close(oracle.project(projected, semantic), projected, rtol=0.0, atol=1e-5)
    by_hand = oracle.project(torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[2.0, 0.0]]]))  # (1, 1, 2)
    assert torch.equal(by_hand, torch.tensor([[[3.0, 0.0]]]))
    # 4096 entries of 300 square to more than float16 holds.
    large = torch.full((1, 1, 4096), 300.0, dtype=torch.float16)  # (1, 1, hidden)
    assert torch.equal(oracle.project(large, large), large)


@every_family
def test_directories_are_deterministic_and_can_be_sharded(
    tiny_model: Callable[..., Any], stock: Stock, family: str
) -> None:
    """The same seed gives the same files, another seed other weights, and shards come with an index."""
    model, _ = stock(family)
    sharded, _ = stock(family, shards=3)
    other, _ = stock(family, seed=1)
    directory = tiny_model(family, shards=3)
    assert (directory / "model.safetensors.index.json").exists()
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    for name in ("config.json", "tokenizer.json", "processor_config.json", "preprocessor_config.json"):
        assert (directory / name).read_text() == (tiny_model(family) / name).read_text()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), sharded.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
