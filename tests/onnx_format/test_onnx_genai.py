"""Exported directories in onnxruntime-genai, as it finds them: they refuse and answer as torch does."""

from collections.abc import Callable
from typing import Any

import genai_runner
import pytest
import tiny
import torch
from genai_runner import TOKENS

PROMPTS = ("what is in this picture", "tell me how to cook rice", "why is the old house red", "list three ideas")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("onnx-llava"),
    pytest.mark.skipif(genai_runner.MISSING, reason=genai_runner.WHY),
]


@pytest.fixture(scope="module")
def guarded(split: Any) -> Any:
    return split("llava")


@pytest.fixture(scope="module")
def ask(guarded: Any, exported: Any) -> Callable[..., Any]:
    """`ask(turns, ..., pixels=..., chunk_size=...)`: what is said to each conversation, of turns' rows of ids."""
    directory, picture = exported(guarded.directory), guarded.model.config.image_token_id
    return lambda *conversations, **options: genai_runner.ask(directory, conversations, picture=picture, **options)


@pytest.fixture(scope="module")
def prompts(guarded: Any) -> list[list[int]]:
    """Prompts of text as token ids, of which some are refused."""
    chats = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in PROMPTS]
    return [
        guarded.processor.apply_chat_template([chat], add_generation_prompt=True, tokenize=True, return_dict=True)[
            "input_ids"
        ][0]
        for chat in chats
    ]


@torch.no_grad()
def torch_says(guard: Any, ids: list[int], pixels: Any = None) -> tuple[float, list[int]]:
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    if pixels is not None:
        inputs["pixel_values"] = torch.tensor(pixels)
    answer = guard.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, len(ids) :].tolist()
    return float(guard.model(**inputs).unsafe_probability[0]), answer


def check(found: Any, wanted: tuple[float, list[int]]) -> None:
    assert found["probability"] == pytest.approx([wanted[0]], abs=1e-4)
    assert found["tokens"] == [wanted[1]]


@pytest.mark.parametrize("options", [{}, {"chunk_size": 1}, {"chunk_size": 3}], ids=["whole", "single", "chunks"])
def test_prompts(options: dict[str, int], guarded: Any, prompts: list[list[int]], ask: Any) -> None:
    wanted = [torch_says(guarded, ids) for ids in prompts]
    assert {answer == guarded.refusal for _, answer in wanted} == {True, False}, "both verdicts must have been seen"
    for (found,), right in zip(ask(*([[ids]] for ids in prompts), **options), wanted, strict=True):
        check(found, right)


def test_a_second_turn(guarded: Any, prompts: list[list[int]], ask: Any) -> None:
    """An end of an answer is never fed, so that the next turn begins with it."""
    for first in prompts:
        wanted, end = torch_says(guarded, first), guarded.refusal[-1:]
        again = end * (wanted[1][-1:] == end) + prompts[-1]
        ((one, two),) = ask([[first], [again]])
        check(one, wanted)
        check(two, torch_says(guarded, first + wanted[1] + prompts[-1]))


@pytest.mark.parametrize("options", [{}, {"chunk_size": 3}], ids=["whole", "chunks"])
def test_pictures(options: dict[str, int], guarded: Any, prompts: list[list[int]], ask: Any) -> None:
    """A picture in the first turn, and a question about it in the second."""
    refused = set()
    for chat in tiny.conversations(images=True, count=8, seed=1):
        inputs = tiny.encode(guarded.processor, [chat])
        if "pixel_values" not in inputs:
            continue
        ids, pixels = inputs["input_ids"][0].tolist(), inputs["pixel_values"].tolist()
        wanted, end = torch_says(guarded, ids, pixels), guarded.refusal[-1:]
        again = end * (wanted[1][-1:] == end) + prompts[-1]
        ((one, two),) = ask([[ids], [again]], pixels=pixels, **options)
        check(one, wanted)
        check(two, torch_says(guarded, ids + wanted[1] + prompts[-1], pixels))
        refused.add(wanted[1] == guarded.refusal)
    assert refused == {True, False}, "both verdicts must have been seen"


def test_a_batch_padded_on_the_right(guarded: Any, prompts: list[list[int]], ask: Any) -> None:
    """Verdicts and refusals hold; the answer to a padded prompt that is allowed begins behind the padding."""
    longest, pad = max(map(len, prompts)), guarded.model.generation_config.pad_token_id
    ((found,),) = ask([[ids + [pad] * (longest - len(ids)) for ids in prompts]])
    for row, ids in enumerate(prompts):
        probability, answer = torch_says(guarded, ids)
        assert found["probability"][row] == pytest.approx(probability, abs=1e-4)
        assert (found["tokens"][row][: len(guarded.refusal)] == guarded.refusal) == (answer == guarded.refusal)
