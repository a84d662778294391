"""When a verdict is due, and what the cache keeps for it; prompts in pieces are tried in test_families."""

import copy
from collections.abc import Callable
from unittest import mock

import pytest
import tiny
import torch
from conftest import Guard
from feeding import positions
from fuzzing import examples
from hypothesis import example, given
from hypothesis import strategies as st
from rule import RULE, calls, check_calls

from sasa_export.runtime import verdict
from sasa_export.runtime.host import in_embeddings
from sasa_export.runtime.ledger import Ledger
from sasa_export.runtime.verdict import Call, TemplateTokens, find_due, follow
from sasa_export.writers.config import generation_prompt_ids, other_generation_prompts

Guards = Callable[..., Guard]

TOLERANCE = 1e-5


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_embeddings_instead_of_ids(guard: Guards, family: str) -> None:
    """The template is recognised in embeddings too, and a prompt of them is judged as one of ids."""
    guarded = guard(family)
    tokens = TemplateTokens.of(guarded.model.config.sasa)
    ids = torch.arange(guarded.model.config.get_text_config().vocab_size)[None]  # (1, vocabulary)
    embedding = guarded.model.get_input_embeddings()
    found = in_embeddings(embedding(ids), embedding(torch.tensor(tokens.table)))
    assert torch.equal(found, tokens.in_ids(ids))
    inputs = guarded.batch(images=False)
    expected, stock = guarded.expected(inputs), guarded.stock(**inputs).logits
    places, ids = positions(guarded, inputs), inputs.pop("input_ids")
    with guarded.at(float(expected.mean())):
        output = guarded.model(**inputs, inputs_embeds=embedding(ids), position_ids=places)
        refused = expected >= expected.mean()  # (batch,)
    torch.testing.assert_close(output.unsafe_probability, expected, rtol=0.0, atol=TOLERANCE)
    torch.testing.assert_close(output.logits[~refused], stock[~refused], rtol=0.0, atol=1e-4)
    assert (output.logits[refused, -1].argmax(-1) == guarded.refusal[0]).all()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_ledger_gives_back_what_it_was_given(guard: Guards, family: str, dtype: torch.dtype) -> None:
    """Columns to the last digit in any type of cache, for positions that no tiny prompt reaches; states as rounded."""
    ledger = Ledger.of(guard(family).model.config.get_text_config(decoder=True))
    places = torch.tensor([0, 1, 127, 128, 129, 255, 256, 16_383, 16_384, 131_071, 1_000_000, -1, -300])
    places = torch.stack([places.roll(axis) for axis in range(ledger.axes)])[:, None]  # (axes, 1, tokens)
    columns = torch.tensor([250, 2, 200, 1]).expand(1, places.shape[-1], 4)  # (1, tokens, 4)
    columns = torch.cat([columns, ledger.digits(places).long()], dim=-1)  # (1, tokens, columns)
    states = torch.randn(1, places.shape[-1], ledger.hidden, generator=torch.Generator().manual_seed(0))
    packed = ledger.pack(columns, states, dtype)
    assert len(packed) == 2 * ledger.layers
    found, unpacked = ledger.unpack(packed)
    assert torch.equal(found, columns) and torch.equal(unpacked, states.to(dtype))
    assert torch.equal(ledger.positions(found).view_as(places), places)
    assert torch.equal(ledger.tail(packed, 3), columns[:, -3:, :3])


TOKENS = TemplateTokens.of(RULE)


@examples(300)
@given(calls, st.integers(0, 3), st.booleans())
@example([[5, 7], [8]], 0, True)
@example([[5, 7, 8], [11, 12], [5]], 2, True)
def test_the_rule_token_by_token(fed: list[list[int]], padding: int, harmful: bool) -> None:
    check_calls(verdict, torch.tensor, fed, padding, harmful)


def test_generate_says_where_its_prompt_ends() -> None:
    """What a decoding loop feeds behind its prompt is never one, be it drafts with a generation prompt in them."""
    earlier = torch.tensor([[[0, 0, 0], [2, 2, 0]]])  # (1, 2, 3): token 1 of a refusal is due
    ids = torch.tensor([[11, 7, 8, 5]])
    call = Call(
        TOKENS.in_ids(ids), ids != 0, earlier, torch.tensor(True), torch.tensor(False), torch.zeros(4, dtype=torch.bool)
    )
    due = find_due(call, TOKENS)
    assert not due.rows.any()
    states, _ = follow(call, due, due.rows, TOKENS)
    assert states[0, 0] == 1  # a stray: 12 was due


THINKS = (
    "{% for message in messages %}USER: {{ message['content'][0]['text'] }} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:"
    "{% if enable_thinking is defined and not enable_thinking %} none{% endif %}{% endif %}"
)


@torch.no_grad()
def test_generation_prompts_of_other_settings(guard: Guards) -> None:
    """Where a template turns thinking off behind its generation prompt, the prompt ends behind that."""
    guarded = guard("llava")
    processor = copy.deepcopy(guarded.processor)
    processor.chat_template = THINKS
    opening = generation_prompt_ids(processor)
    (other,) = other_generation_prompts(processor, opening)
    assert other[: len(opening)] == opening and len(other) > len(opening)
    ids = torch.tensor([[60, 61, 62, *other]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    settings = {"generation_prompt_ids": opening, "other_generation_prompt_ids": [other]}
    with mock.patch.dict(guarded.model.config.sasa, settings):
        expected = guarded.expected(inputs)
        torch.testing.assert_close(guarded.model.judge(**inputs), expected, rtol=0.0, atol=TOLERANCE)
        torch.testing.assert_close(guarded.model(**inputs).unsafe_probability, expected, rtol=0.0, atol=TOLERANCE)
        with pytest.raises(ValueError, match="begins the answer"):
            guarded.model.judge(input_ids=torch.cat([ids, ids[:, :1]], dim=1))
    with mock.patch.dict(guarded.model.config.sasa, settings | {"other_generation_prompt_ids": []}):
        with pytest.raises(ValueError, match="begins the answer"):
            guarded.model.judge(**inputs)
