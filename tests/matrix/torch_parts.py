"""Parts of a patched model, and engines that would run it in their own way."""

import copy
from typing import Any

import torch

from matrix.bench import EVERY, MARGIN, Bench, generate, without
from matrix.outcome import HOLDS, NOT_ASKED, UNCHANGED, Outcome, row

SECTION = "Parts and engines"


@row("torch", SECTION, "model.model alone", EVERY)
def base_model(bench: Bench) -> Outcome:
    """It gives hidden states, says no word and judges nothing."""
    found, expected = bench.model.model(**bench.mixed), bench.stock.model(**bench.mixed)
    assert "logits" not in found and "unsafe_probability" not in found
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert not hasattr(bench.model.model, "generate")
    return Outcome(
        NOT_ASKED, UNCHANGED,
        "the stock module: hidden states, no logits, no generate, no verdict; a cache that it filled raises",
    )  # fmt: skip


@row("torch", SECTION, "model.language_model alone", EVERY)
def decoder(bench: Bench) -> Outcome:
    inputs = without(bench.batch(images=False), "token_type_ids", "mm_token_type_ids")
    found, expected = (one.model.language_model(**inputs) for one in (bench.model, bench.stock))
    assert "logits" not in found and "unsafe_probability" not in found
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert not hasattr(bench.model.model.language_model, "generate")
    return Outcome(
        NOT_ASKED, UNCHANGED,
        "the stock module: hidden states, no logits, no generate, no verdict; a cache that it filled raises",
    )  # fmt: skip


@row("torch", SECTION, "continuous batching (generate_batch)")
def continuous(bench: Bench) -> Outcome:
    ids = bench.one()["input_ids"][0].tolist()
    settings = copy.deepcopy(bench.stock.generation_config)
    settings.max_new_tokens = 4
    for enter in ("init_continuous_batching", "continuous_batching_context_manager"):
        bench.loud(getattr(bench.model, enter), "packed into one row")
    return bench.loud(
        lambda: bench.model.generate_batch(inputs=[ids, ids[:-4]], generation_config=settings), "packed into one row"
    )


@row("torch", SECTION, "paged cache in generate")
def paged(bench: Bench) -> Outcome:
    return bench.loud(lambda: generate(bench.model, bench.one(), cache_implementation="paged"), "packed into one row")


@row("torch", SECTION, "paged attention set on the model")
def paged_attention(bench: Bench) -> Outcome:
    twin = copy.deepcopy(bench.model)
    twin.config._attn_implementation = "paged|sdpa"
    return bench.loud(lambda: twin(**bench.one()), "packed")


@row("torch", SECTION, "several prompts in one row, told apart by their positions")
def packed(bench: Bench) -> Outcome:
    """As trainers pack sequences: positions begin anew, without a mask. The first prompt's verdict is asked for."""
    both = [bench.one(seed=1), bench.one(seed=2)]
    lengths = [one["input_ids"].shape[1] for one in both]
    call: dict[str, Any] = {
        "input_ids": torch.cat([one["input_ids"] for one in both], dim=1),  # (1, tokens)
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],  # (1, tokens)
        "use_cache": False,
    }
    end = lengths[0] - 1
    expected = bench.stock(**call).logits[:, end]  # (1, vocabulary)
    alone = bench.stock(**both[0]).logits[:, -1]  # (1, vocabulary)
    torch.testing.assert_close(expected, alone, rtol=0.0, atol=1e-4)
    score = float(bench.guarded.expected(both[0]))
    with bench.threshold(score + MARGIN):
        assert torch.equal(bench.model(**call).logits[:, end], expected), "harmless logits changed"
    with bench.threshold(score - MARGIN):
        found = bench.model(**call).logits[0, end].argmax()
    assert found == bench.guarded.refusal[0], "harmful logits are not the refusal's"
    return HOLDS


@row("torch", SECTION, "several prompts in one row, told apart by a mask of four dimensions")
def packed_by_mask(bench: Bench) -> Outcome:
    both = torch.cat([bench.one(seed=seed)["input_ids"] for seed in (1, 2)], dim=1)  # (1, tokens)
    mask = torch.ones(both.shape[1], both.shape[1]).tril()[None, None] > 0  # (1, 1, tokens, tokens)
    return bench.loud(
        lambda: bench.model(input_ids=both, attention_mask=mask, use_cache=False),
        "attention_mask must be", kind=NotImplementedError,
    )  # fmt: skip
