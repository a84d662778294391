"""Random conversations with the prefix cache are judged as without it, wherever in a block their turns end."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from conftest import BOTH, Model
from engine import serve

BLOCK, REACH = 32, 8  # tokens of a cache block, and those that the lane of these models runs over
MARKS = {"llava": [3], "qwen2_5_vl": [3, 5, 4], "gemma3": [6]}  # what stands for a picture in a prompt
WORDS = range(60, 360)  # tokens of no template
# Each is compared with one engine that has no prefix cache, and room.
ENGINES: dict[str, dict[str, Any]] = {
    "prefix cache": {},
    "chunks": {"max_num_batched_tokens": 40},
    "a cache that is too small": {"max_num_batched_tokens": 40, "num_gpu_blocks_override": 24},
}
UNCAPPED = """
from vllm.v1.core.sched.scheduler import Scheduler
Scheduler.__init__ = Scheduler.__init__.__wrapped__
"""
UNCHECKED = """
from sasa_vllm.lane import Lane
Lane.is_whole = lambda lane, tail, prompt: tail.end == prompt
"""
Batches = list[list[dict[str, Any]]]


def conversations(guarded: Model, count: int) -> Batches:
    """All first turns, all second ones, ...; and each once more at the end. A turn goes `after` an earlier one: behind
    its prompt and whatever the engine answered."""
    draw = random.Random(0)
    texts = [prompt["ids"] for prompt in guarded.prompts if prompt["text"] and not prompt["picture"]]
    answers = [prompt["answer"] for prompt in guarded.prompts if prompt["text"] and not prompt["picture"]]
    seconds = [prompt["ids"] for prompt in guarded.prompts if not prompt["text"]]
    turns = [ids[len(text) + len(said) :] for ids, text, said in zip(seconds, texts, answers, strict=True)]
    first, later, closing = beginning(texts), beginning(turns), beginning([ids[::-1] for ids in texts])[::-1]
    pictures = sorted({prompt["picture"] for prompt in guarded.prompts if prompt["picture"]})
    prefixes = [draw.choices(WORDS, k=draw.randint(0, 90)) for _ in range(4)]  # which many conversations share
    batches: Batches = [[], [], []]
    for _ in range(count):
        after, shown = None, []
        for number in range(draw.choice((2, 2, 3))):
            words = draw.choices(WORDS, k=draw.randint(0, 40))
            words = [*draw.choice(prefixes), *words] if number == 0 else words
            if draw.random() < 0.4:
                words, shown = [*MARKS[guarded.folder.name], *words], [*shown, draw.choice(pictures)]
            prompt = {"ids": [*(later if number else first), *words, *closing], "after": after, "picture": shown}
            prompt["params"] = {"max_tokens": draw.randint(1, 40), "ignore_eos": True}
            after = [number, len(batches[number])]
            batches[number].append(prompt)
    return [*batches, list(itertools.chain(*batches))]


def beginning(texts: list[list[int]]) -> list[int]:
    """What they have in common."""
    return [token for token, *_ in itertools.takewhile(lambda same: len(set(same)) == 1, zip(*texts, strict=False))]


def shared(batches: Batches, found: Batches) -> int:
    """The tokens that a prefix cache has to spare, at least: whole blocks of what was computed of the conversation, but
    for the last tokens of a prompt."""
    tokens, known = 0, {}
    for number, (batch, outcomes) in enumerate(zip(batches, found, strict=True)):
        for place, (prompt, outcome) in enumerate(zip(batch, outcomes, strict=True)):
            length = len(outcome["ids"])
            before = length if number == 3 else known.get(tuple(prompt["after"] or ()), 0)
            tokens += min(before, length - REACH) // BLOCK * BLOCK
            known[number, place] = length + len(outcome["answers"][0]) - 1
    return tokens


def differences(found: Batches, alone: Batches) -> list[float]:
    """Of P(unsafe), infinite where it is NaN, and then the request is refused; where there is none, all is the same."""
    far = []
    for outcome, expected in zip(itertools.chain(*found), itertools.chain(*alone), strict=True):
        assert outcome["error"] is None and len(outcome["probabilities"]) == 1, "no verdict, or two"
        far.append(abs(outcome["probability"] - expected["probability"]))
        if math.isnan(far[-1]):
            far[-1] = math.inf
            assert outcome["reasons"] == ["content_filter"]
        elif far[-1] < 1e-5:
            assert outcome["ids"] == expected["ids"] and outcome["answers"] == expected["answers"]
            assert outcome["reasons"] == expected["reasons"]
    return far


@pytest.mark.parametrize("name", MARKS)
@BOTH
def test_conversations(model: Callable[[str], Model], name: str, v2: bool) -> None:
    guarded = model(name)
    batches = conversations(guarded, 20 if v2 else 200)
    alone, counters = serve(guarded.directory, *batches, enable_prefix_caching=False, v2=v2)
    assert counters["vllm:prefix_cache_hits"] == counters["vllm:num_preemptions"] == 0
    reasons = [outcome["reasons"][0] for outcome in itertools.chain(*alone)]
    assert 0.1 < reasons.count("content_filter") / len(reasons) < 0.9
    if not v2:
        assert {len(outcome["ids"]) % BLOCK for outcome in alone[1]} == set(range(BLOCK))
    for engine, options in ENGINES.items():
        if name == "gemma3" and "num_gpu_blocks_override" in options:  # whose windows have blocks of their own
            options = {**options, "num_gpu_blocks_override": 56}
        found, counters = serve(guarded.directory, *batches, block_size=BLOCK, v2=v2, **options)
        assert max(differences(found, alone)) < 1e-5, engine
        least = shared(batches, alone) if name != "gemma3" and engine == "prefix cache" else 1
        assert counters["vllm:prefix_cache_hits"] >= least > 0
        assert (counters["vllm:num_preemptions"] > 0) == (engine == "a cache that is too small")


@BOTH
def test_without_the_cap(model: Callable[[str], Model], v2: bool) -> None:
    """Where the cache hands out some of the last tokens, the worker sees that the lane lacks them, and refuses."""
    guarded = model("llava")
    batches = conversations(guarded, 20)
    alone, _ = serve(guarded.directory, *batches, enable_prefix_caching=False, v2=v2)
    far = differences(serve(guarded.directory, *batches, before=UNCAPPED, v2=v2)[0], alone)
    refused = [value == math.inf for value in far]
    assert sum(refused) > 5 and all(value < 1e-5 or value == math.inf for value in far)
    far = differences(serve(guarded.directory, *batches, before=UNCAPPED + UNCHECKED, v2=v2)[0], alone)
    assert [1e-5 < value < math.inf for value in far] == refused, "without either, those are judged wrongly"
