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


def batch(processor: ProcessorMixin, padding_side: Any = "left") -> BatchFeature:
    """Four prompts of different lengths, of which one has no picture."""
    return tiny.prompts(processor, images=True, count=4, seed=1, padding_side=padding_side)


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
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_batch_rows_equal_single_rows(stock: Stock, family: str, padding_side: str) -> None:
    """Padding on either side changes neither the plain logits nor SASA's."""
    model, processor = stock(family)
    inputs = batch(processor, padding_side)
    assert inputs["attention_mask"][:, 0 if padding_side == "left" else -1].min() == 0
    plain = oracle.plain_logits(model, inputs)  # (batch, vocabulary)
    sasa = oracle.oracle_logits(model, inputs, SAFETY, SEMANTIC)  # (batch, vocabulary)
    for row, chat in enumerate(tiny.conversations(images=True, count=4, seed=1)):
        alone = tiny.encode(processor, [chat])  # unpadded
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


def test_projection() -> None:
    """By hand: along h_f, zero where that is zero, and in half floats that square to more than float16 holds."""
    safety = torch.tensor([[[3.0, 4.0], [1.0, 1.0], [3.0, 4.0]]])  # (1, tokens, hidden)
    semantic = torch.tensor([[[2.0, 0.0], [0.0, 0.0], [1.0, 1.0]]])  # (1, tokens, hidden)
    assert oracle.project(safety, semantic).tolist() == [[[3.0, 0.0], [0.0, 0.0], [3.5, 3.5]]]
    large = torch.full((1, 1, 4096), 300.0, dtype=torch.float16)  # (1, 1, hidden)
    assert torch.equal(oracle.project(large, large), large)
