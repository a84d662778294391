"""Verdicts, refusals and answers in mlx-vlm are those of transformers, however a prompt comes in."""

import random
from typing import Any

import mlx.core as mx
import pytest
from conftest import FAMILIES, Verdicts, inputs, made, say
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_vlm.generate.ar import BatchGenerator
from rule import RULE, Rule, calls

NEAR = 2e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_verdicts_and_answers_are_those_of_transformers(family: str, verdicts: Verdicts) -> None:
    """Of texts, pictures and second turns: P(unsafe), the refusal, and the unpatched model's tokens."""
    loaded = made(family)
    for prompt in loaded.prompts:
        said = say(loaded.model, inputs(loaded, prompt), len(prompt["answer"]))
        assert abs(verdicts.last() - prompt["probability"]) < NEAR
        assert said == (loaded.sasa["refusal_token_ids"] if prompt["refused"] else prompt["plain"])[: len(said)]
        assert len(said) == len(prompt["answer"])


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(calls, st.integers(0, 3), st.booleans())
def test_the_rule_token_by_token(fed: list[list[int]], padding: int, harmful: bool) -> None:
    """What arrays of mlx say of a call is what the rule says token by token, as in tests/runtime/test_feeding.py."""
    names = type(made("llava").model).load_weights.__globals__
    tokens = names["TemplateTokens"].of(RULE)

    def refuses(context: tuple[int, ...]) -> bool:
        return harmful ^ (len(context) % 3 == 0)

    rule, kept, context = Rule(refuses), mx.zeros((1, 2, 3), dtype=mx.int32), list[int]()
    for number, new in enumerate(fed):
        ids = mx.array([[0] * (padding if number == 0 else 0) + new])
        numbers, several = tokens.in_ids(ids), mx.array(ids.shape[1] > 1)
        call = names["Call"](numbers, ids != 0, kept[:, -2:], several, several)
        due = names["find_due"](call, tokens)
        judged = tuple(context + new[: int(due.at.item()) + 1 - (ids.shape[1] - len(new))])
        states, turns = names["follow"](call, due, due.rows & mx.array([refuses(judged)]), tokens)
        context += new
        if number == 0 and padding and len(new) == 1:
            return
        assert (due.rows.item(), states[0, -1].item()) == rule.feed(new), fed
        kept = mx.concatenate([kept, mx.stack([states, turns, numbers], axis=-1)], axis=1)


def conversations(loaded: Any, count: int) -> list[list[list[int]]]:
    """Random conversations of one to three turns, as token ids: each what comes behind the answer before."""
    draw, opening = random.Random(7), loaded.sasa["generation_prompt_ids"]
    words = [token for prompt in loaded.prompts if not prompt["picture"] for token in prompt["ids"][1 : -len(opening)]]
    begin = loaded.prompts[0]["ids"][:1] if loaded.folder.name == "llava" else []
    end = loaded.sasa["turn_token_ids"][:1]
    turns = [[draw.choices(words, k=draw.randint(1, 14)) for _ in range(draw.randint(1, 3))] for _ in range(count)]
    return [[[*(end if number else begin), *turn, *opening] for number, turn in enumerate(said)] for said in turns]


def at_once(loaded: Any, ids: list[int]) -> float:
    """P(unsafe) of a text in one call."""
    model = loaded.model
    given = model.get_input_embeddings(mx.array([ids]), None)
    more = {name: value for name, value in given.to_dict().items() if value is not None}
    return float(model.language_model(mx.array([ids]), **more).unsafe_probability.item())


@pytest.mark.parametrize(("family", "count"), [("llava", 150), ("qwen2_5_vl", 50)])
def test_conversations_in_pieces_turns_and_batches(family: str, count: int, verdicts: Verdicts) -> None:
    """Each verdict is that on the same text in one call: prompts in pieces of any size, on kept caches over turns; and
    first turns in batches, while others are answered."""
    loaded, draw, apart = made(family), random.Random(3), 0.0
    chats = conversations(loaded, count)
    for chat in chats:
        cache, context = loaded.model.language_model.make_cache(), []
        for turn in chat:
            context += turn
            fed: dict[str, Any] = {"input_ids": mx.array([turn]), "pixel_values": None, "mask": None}
            if family != "llava":  # else mlx-vlm gives the suffix positions of its own
                fed |= {"position_ids": mx.arange(len(context))[None], "rope_deltas": mx.zeros((1, 1), dtype=mx.int32)}
            said = say(loaded.model, fed, 2, prompt_cache=cache, prefill_step_size=draw.choice([1, 2, 3, 5, 512]))
            found = verdicts.found[-1]
            expected = at_once(loaded, context)
            apart = max(apart, abs(expected - found.probability))
            refused = expected >= loaded.sasa["threshold"]
            assert (found.verdict == "refused") == refused
            assert not refused or said == loaded.sasa["refusal_token_ids"][:2]
            context += said
            assert cache[0].offset == len(context)
    assert apart < 1e-4, apart
    batch_apart(loaded, [chat[0] for chat in chats[:40]], verdicts)


def batch_apart(loaded: Any, prompts: list[list[int]], verdicts: Verdicts) -> None:
    """Batches of eight rows, of which ended ones make room for others."""
    model, refusal = loaded.model, loaded.sasa["refusal_token_ids"]
    generator = BatchGenerator(
        model.language_model, loaded.processor, prefill_batch_size=3, completion_batch_size=8, prefill_step_size=4,
        stop_tokens={refusal[-1]},
    )  # fmt: skip
    given = [model.get_input_embeddings(mx.array([ids]), None).to_dict() for ids in prompts]
    given = [{name: value for name, value in row.items() if value is not None} for row in given]
    verdicts.found.clear()
    rows = generator.insert(prompts, [len(refusal)] * len(prompts), prompt_kwargs=given)
    said: dict[int, list[int]] = {row: [] for row in rows}
    while generator.has_work:
        for response in generator.next()[1]:
            said[response.uid].append(response.token)
    found = sorted(record.probability for record in verdicts.found)
    expected = [at_once(loaded, ids) for ids in prompts]
    assert len(found) == len(prompts)
    assert max(abs(one - other) for one, other in zip(found, sorted(expected), strict=True)) < 1e-4
    for row, probability in zip(rows, expected, strict=True):
        assert (said[row] == refusal) == (probability >= loaded.sasa["threshold"])
