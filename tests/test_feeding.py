"""The verdict does not depend on how a prompt is fed: whole, in pieces, over turns, after a rewind, as embeddings."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from conftest import Guard
from torch import Tensor

from sasa_export.runtime.turn import read_turn
from sasa_export.runtime.words import Words

Guards = Callable[..., Guard]

FAMILIES = [pytest.param(family, marks=pytest.mark.xdist_group(family)) for family in tiny.FAMILIES]
every_family = pytest.mark.parametrize("family", FAMILIES)
CHUNKINGS = 50
TOLERANCE = 1e-5


def positions(guarded: Guard, inputs: dict[str, Any]) -> Tensor:
    """The position ids of a prompt: (batch, tokens), or (3, batch, tokens) where a family has three axes."""
    mask = inputs["attention_mask"]  # (batch, tokens)
    flat = (mask.cumsum(-1) - 1).clamp_min(0)  # (batch, tokens)
    model = guarded.stock.model
    if not hasattr(model, "get_rope_index"):
        return flat
    if "image_grid_thw" not in inputs:
        return flat.expand(3, -1, -1)
    names = ("mm_token_type_ids", "image_grid_thw")
    found, _ = model.get_rope_index(inputs["input_ids"], attention_mask=mask, **{n: inputs[n] for n in names})
    return found


def feed(guarded: Guard, inputs: dict[str, Any], ends: list[int], *, embeds: Tensor | None = None) -> Any:
    """Feed a prompt in pieces that end at `ends`; pictures come with the first. Returns the last call's output."""
    places = positions(guarded, inputs)  # (..., batch, tokens)
    cache, start, found = None, 0, None
    for end in ends:
        piece: dict[str, Any] = {
            "attention_mask": inputs["attention_mask"][:, :end],
            "position_ids": places[..., start:end],
            "past_key_values": cache,
            "use_cache": True,
        }
        if embeds is None:
            piece["input_ids"] = inputs["input_ids"][:, start:end]
        else:
            piece["inputs_embeds"] = embeds[:, start:end]
        if "token_type_ids" in inputs:
            piece["token_type_ids"] = inputs["token_type_ids"][:, :end]
        if start == 0:
            rest = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
            piece |= {name: value for name, value in inputs.items() if name not in rest}
        found = guarded.model(**piece)
        cache, start = found.past_key_values, end
    return found


def chunkings(tokens: int, first: int, seed: int) -> list[list[int]]:
    """Random ways to cut a prompt, the first piece at least `first` tokens; among them one token at a time."""
    draw = random.Random(seed)
    ways = [[*range(first, tokens + 1)], [tokens - 1, tokens]]
    while len(ways) < CHUNKINGS:
        share = draw.choice((0.05, 0.2, 0.5))
        ends = [end for end in range(first, tokens) if draw.random() < share]
        ways.append([*ends, tokens])
    return ways


def last_picture_token(guarded: Guard, inputs: dict[str, Any]) -> int:
    """How many tokens of a batch reach to the end of its last picture."""
    config = guarded.model.config
    token = getattr(config, "image_token_id", None) or config.image_token_index
    columns = (inputs["input_ids"] == token).any(dim=0).nonzero()  # (columns, 1)
    return int(columns.max()) + 1 if len(columns) else 1


@every_family
@pytest.mark.parametrize("images", [False, True], ids=["text", "images"])
@torch.no_grad()
def test_random_chunkings(guard: Guards, family: str, images: bool) -> None:
    """P(unsafe), verdicts and forced tokens are those of the whole prompt, by the oracle, for any cutting."""
    guarded = guard(family)
    inputs = dict(tiny.prompts(guarded.processor, images=images, count=3, seed=4, padding_side="left"))
    expected = guarded.expected(inputs)  # (batch,)
    tokens = inputs["input_ids"].shape[1]
    with guarded.halved(inputs) as refused:
        for ends in chunkings(tokens, last_picture_token(guarded, inputs), seed=1):
            found = feed(guarded, inputs, ends)
            torch.testing.assert_close(found.unsafe_probability, expected, rtol=0.0, atol=TOLERANCE)
            said = found.logits[:, -1].argmax(-1)  # (batch,)
            assert torch.equal(said == guarded.refusal[0], refused), ends


def read(
    ids: list[list[int]], past: int, before: list[int], prompt_end: int | None = None, covered: bool = True
) -> tuple[Any, Any, Any]:
    """`read_turn` with a past that a verdict covers or not.

    0 is padding, (7, 8) the generation prompt, 2 an end of turn and (11, 12, 2) the refusal.
    """
    words = Words.of({"generation_prompt_ids": [7, 8], "turn_token_ids": [2], "refusal_token_ids": [11, 12, 2]})
    tokens = torch.tensor(ids)
    several = past == 0 or tokens.shape[1] - past > 1
    marks = (torch.arange(tokens.shape[1]) < past).expand_as(tokens) & covered
    turn = read_turn(words.in_ids(tokens), tokens != 0, past, several, torch.tensor(before), marks, words, prompt_end)
    refused = turn.states(torch.ones(len(ids), dtype=torch.bool))
    return turn.judged.tolist(), turn.due.tolist(), refused.tolist()


def test_a_prompt_ends_with_the_generation_prompt() -> None:
    judged, due, states = read([[5, 7, 8, 9, 9], [5, 2, 5, 7, 8], [5, 7, 8, 11, 12], [5, 7, 8, 2, 5]], 0, [0] * 4)
    assert judged == [2, 4, 2, 4]  # the last row's answer is over, and another turn has begun
    assert due == [True] * 4
    # A foreign answer is refused from its next token on; one that is the refusal so far goes on.
    assert states == [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [0, 0, 1, 2, 3], [0, 0, 0, 0, 1]]


def test_padding_within_a_generation_prompt() -> None:
    judged, due, _ = read([[5, 7, 0, 0, 8], [0, 0, 5, 7, 8]], 4, [0, 0])
    assert judged == [4, 4] and due == [True, True]


def test_an_answer_is_not_judged() -> None:
    _, due, states = read([[5, 7, 8, 9], [5, 7, 8, 11]], 3, [0, 1])
    assert due == [False, False] and states == [[0], [2]]
    _, due, states = read([[5, 7, 8, 9, 9], [5, 7, 8, 11, 12]], 3, [0, 1])  # as drafts are fed
    assert due == [False, False] and states == [[0, 0], [2, 3]]


def test_a_past_without_a_verdict_is_judged() -> None:
    """Whoever crops a conversation back behind an earlier prompt finds no verdict there."""
    judged, due, states = read([[5, 7, 8, 9], [5, 7, 8, 11], [5, 5, 5, 9]], 3, [0, 0, 0], covered=False)
    assert judged == [2, 2, 3] and due == [True] * 3
    assert states == [[1], [2], [1]]


def test_text_without_a_template() -> None:
    assert read([[5, 5, 5]], 0, [0])[:2] == ([2], [True])
    assert read([[5, 5, 5, 5]], 2, [0])[:2] == ([3], [True])
    assert read([[5, 5, 5, 5]], 3, [0])[1] == [False]
    # A decoding loop says where its prompt ends, and what it feeds behind that is never a prompt.
    assert read([[5, 5, 5, 5]], 0, [0], prompt_end=2)[:2] == ([1], [True])
    assert read([[5, 5, 5, 5]], 2, [0], prompt_end=2)[1] == [False]
    assert read([[5, 5, 5]], 0, [0], prompt_end=4)[1] == [False]
    assert read([[5, 5, 5, 5]], 3, [0], prompt_end=4)[:2] == ([3], [True])


def test_text_that_comes_a_token_at_a_time() -> None:
    """Each token may be the prompt's last, until several come at once; but a refusal goes on to its end."""
    for ids in ([5], [5, 5], [5, 5, 5]):
        assert read([ids], len(ids) - 1, [0], covered=False)[1:] == ([True], [[1]])
    assert read([[5, 11], [5, 9]], 1, [1, 1], covered=False)[1:] == ([False, True], [[2], [1]])
    assert read([[5, 11, 12]], 2, [2], covered=False)[1:] == ([False], [[3]])
    assert read([[5, 11, 12]], 1, [1], covered=False)[1] == [True]


def test_embeddings_are_recognised(guard: Guards) -> None:
    """Symbols read off embeddings are those of the ids."""
    guarded = guard("gemma3")
    words = Words.of(guarded.model.config.sasa)
    ids = torch.arange(guarded.model.config.text_config.vocab_size)[None]  # (1, vocabulary)
    embedding = guarded.model.get_input_embeddings()
    with torch.no_grad():
        found = words.in_embeddings(embedding(ids), embedding(torch.tensor(words.table)))
    assert torch.equal(found, words.in_ids(ids))
