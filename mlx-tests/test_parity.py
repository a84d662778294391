"""refusals and answers in mlx-vlm are those of transformers, however a prompt comes in."""

import random
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from conftest import batch, embedded, inputs, made, say
from hypothesis import given, settings
from hypothesis import strategies as st
from rule import calls, check_calls


@pytest.mark.parametrize("family", ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"))
def test_verdicts_and_answers_are_those_of_transformers(family: str, verdicts: Any) -> None:
    """Of texts, pictures and second turns: P(unsafe), the refusal, and the unpatched model's tokens."""
    loaded = made(family)
    for prompt in loaded.prompts:
        said = say(loaded.model, inputs(loaded, prompt), len(prompt["answer"]))
        assert abs(verdicts()[-1].probability - prompt["probability"]) < 2e-5
        assert said == (loaded.sasa["refusal_token_ids"] if prompt["refused"] else prompt["plain"])[: len(said)]
        assert len(said) == len(prompt["answer"])


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(calls, st.integers(0, 3), st.booleans())
def test_the_rule_token_by_token(fed: list[list[int]], padding: int, harmful: bool) -> None:
    """As in tests/runtime/test_feeding.py."""
    names = SimpleNamespace(**type(made("llava").model).load_weights.__globals__)
    check_calls(names, mx.array, fed, padding, harmful)


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
    output = loaded.model.language_model(mx.array([ids]), **embedded(loaded.model, ids))
    return float(output.unsafe_probability.item())


@pytest.mark.parametrize(("family", "count"), [("llava", 150), ("qwen2_5_vl", 50)])
def test_conversations_in_pieces_turns_and_batches(family: str, count: int, verdicts: Any) -> None:
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
            found = verdicts()[-1]
            expected = at_once(loaded, context)
            apart = max(apart, abs(expected - found.probability))
            refused = expected >= loaded.sasa["threshold"]
            assert (found.verdict == "refused") == refused
            assert not refused or said == loaded.sasa["refusal_token_ids"][:2]
            context += said
            assert cache[0].offset == len(context)
    assert apart < 1e-4, apart
    prompts, refusal = [chat[0] for chat in chats[:40]], loaded.sasa["refusal_token_ids"]
    scores = [at_once(loaded, ids) for ids in prompts]
    verdicts.clear()
    # Of eight rows, of which ended ones make room for others.
    sizes = {"prefill_batch_size": 3, "completion_batch_size": 8, "prefill_step_size": 4}
    answers = batch(loaded, prompts, len(refusal), **sizes)
    found = sorted(record.probability for record in verdicts())
    assert max(abs(one - other) for one, other in zip(found, sorted(scores), strict=True)) < 1e-4
    for said, score in zip(answers, scores, strict=True):
        assert (said == refusal) == (score >= loaded.sasa["threshold"])
