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
both_sides = pytest.mark.parametrize("padding_side", ["left", "right"])


def batch(processor: ProcessorMixin, *, padding_side: Any = "left") -> BatchFeature:
    """Four prompts of different lengths, of which one has no picture."""
    return tiny.prompts(processor, images=True, count=4, seed=1, padding_side=padding_side)


def single_rows(processor: ProcessorMixin) -> list[BatchFeature]:
    """The prompts of `batch`, each encoded alone and without padding."""
    return [tiny.encode(processor, [chat]) for chat in tiny.conversations(images=True, count=4, seed=1)]


@every_family
def test_sasa_changes_the_logits(stock: Stock, family: str) -> None:
    """The second lane reaches every row's logits, and each layer choice gives its own, the last block's too."""
    model, processor = stock(family)
    inputs = batch(processor)
    found = [
        oracle.plain_logits(model, inputs),
        *(oracle.oracle_logits(model, inputs, SAFETY, layer) for layer in (SEMANTIC, SEMANTIC + 1, tiny.LAYERS - 1)),
    ]  # (batch, vocabulary) each
    for number, one in enumerate(found):
        assert one.isfinite().all()
        assert all(((one - other).abs().amax(dim=-1) > 0.1 * found[0].std()).all() for other in found[:number])


@every_family
@both_sides
def test_batch_rows_equal_single_rows(stock: Stock, family: str, padding_side: str) -> None:
    """Padding on either side changes neither the plain logits nor SASA's."""
    model, processor = stock(family)
    inputs = batch(processor, padding_side=padding_side)
    lengths = inputs["attention_mask"].sum(dim=1)  # (batch,)
    assert lengths.unique().numel() > 1
    assert inputs["attention_mask"][:, 0 if padding_side == "left" else -1].min() == 0
    plain = oracle.plain_logits(model, inputs)  # (batch, vocabulary)
    sasa = oracle.oracle_logits(model, inputs, SAFETY, SEMANTIC)  # (batch, vocabulary)
    for row, alone in enumerate(single_rows(processor)):
        assert alone["input_ids"].shape[1] == lengths[row]
        one, other = oracle.plain_logits(model, alone)[0], oracle.oracle_logits(model, alone, SAFETY, SEMANTIC)[0]
        torch.testing.assert_close(one, plain[row], rtol=0.0, atol=TOLERANCE)
        torch.testing.assert_close(other, sasa[row], rtol=0.0, atol=TOLERANCE)


@every_family
def test_hooks_see_the_blocks(stock: Stock, family: str) -> None:
    """Block i's output is hidden_states[i + 1], the last block's before the final norm; put in again, it changes
    nothing."""
    model, processor = stock(family)
    inputs = batch(processor)
    seen = oracle.block_outputs(model, inputs, tuple(range(tiny.LAYERS)))
    with torch.no_grad():
        *states, normed = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
        norm = model.get_submodule(oracle.BLOCKS[family].replace(".layers", ".norm"))
        assert torch.equal(norm(seen[tiny.LAYERS - 1]), normed)
    assert all(torch.equal(seen[layer - 1], state) for layer, state in enumerate(states) if layer > 0)
    assert len(oracle.blocks(model)) == len(states) == tiny.LAYERS
    plain = oracle.plain_logits(model, inputs)  # (batch, vocabulary)
    for layer, state in seen.items():
        assert torch.equal(oracle.logits_with_state(model, inputs, layer, state), plain)


@every_family
def test_folded_probe_equals_the_probe_on_logits(stock: Stock, family: str) -> None:
    """W_head^T w on the normed state scores as w does on the logits."""
    model, processor = stock(family)
    inputs = batch(processor)
    size = model.config.get_text_config().vocab_size
    weight = torch.randn(size, generator=torch.Generator().manual_seed(3)) / 20  # (vocabulary,)
    with torch.no_grad():
        states = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
    normed = states[-1][torch.arange(4), oracle.last_positions(inputs)]  # (batch, hidden)
    folded = torch.sigmoid(normed @ oracle.folded(model, weight) + 0.3)  # (batch,)
    whole = oracle.unsafe_probability(oracle.plain_logits(model, inputs), weight, 0.3)  # (batch,)
    torch.testing.assert_close(folded, whole, rtol=0.0, atol=1e-5)
    assert whole.std() > 0.01


@both_sides
def test_qwen_rows_keep_their_own_image_positions(stock: Stock, padding_side: str) -> None:
    """In a mixed batch, M-RoPE positions follow each row's own image grid, as if the row were alone."""
    model, processor = stock("qwen2_5_vl")
    inputs = batch(processor, padding_side=padding_side)
    assert len(set(map(tuple, inputs["image_grid_thw"].tolist()))) > 1, "rows should differ in their grids"
    seen: list[torch.Tensor] = []  # (3, batch, tokens) each
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    try:
        for one in (inputs, *single_rows(processor)):
            oracle.plain_logits(model, one)
    finally:
        handle.remove()
    whole, *alone = seen
    for row, places in enumerate(alone):
        found = whole[:, row, inputs["attention_mask"][row].bool()]  # (3, tokens of the row)
        if row == 2:  # A lone text prompt is numbered from 0 by the text model; rotation is relative.
            assert (found.diff(dim=-1) == 1).all()
        else:
            assert torch.equal(found, places[:, 0])
            assert not torch.equal(found[1], found[2]) and not torch.equal(found[0], found[1])


def test_projection() -> None:
    """The projection is parallel to h_f, leaves a remainder across it, and survives zeros and large half floats."""
    safety, semantic = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))  # (batch, tokens, hidden)
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
    (model, _), (sharded, _), (other, _) = stock(family), stock(family, shards=3), stock(family, seed=1)
    directory = tiny_model(family, shards=3)
    assert (directory / "model.safetensors.index.json").exists()
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    for name in ("config.json", "tokenizer.json", "processor_config.json", "preprocessor_config.json"):
        assert (directory / name).read_text() == (tiny_model(family) / name).read_text()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), sharded.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
