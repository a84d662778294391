"""The verdict does not depend on how a prompt is fed: whole, in pieces, over turns, after a rewind, as embeddings."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from conftest import Guard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sasa_export.runtime.verdict import Call, TemplateTokens, find_due, follow

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


TOKENS = TemplateTokens.of({"generation_prompt_ids": [7, 8], "turn_token_ids": [2], "refusal_token_ids": [11, 12, 2]})


class Rule:
    """The rule of the verdict, one token after the other, for one row: what a call of any length must come to.

    0 is padding, (7, 8) the generation prompt, 2 an end of turn and (11, 12, 2) the refusal. `refuses` says of each
    context whether its verdict would be to refuse.
    """

    def __init__(self, refuses: Callable[[tuple[int, ...]], bool]) -> None:
        self.refuses = refuses
        self.context: list[int] = []
        self.judged = self.answering = False
        self.state = 0

    def feed(self, tokens: list[int]) -> tuple[bool, int]:
        """Is a verdict due in this call, and STATE behind it."""
        due_at, start, begun = None, self.state, len(self.context)
        for token in tokens:
            self.context.append(token)
            if token == 2:
                self.answering = False
            if self.context[-2:] == [7, 8]:
                self.answering, due_at = True, len(self.context)
        several = len(tokens) > 1
        if not self.answering:
            due_at = len(self.context) if several or not self.judged else None
        if due_at is not None:
            start = int(self.refuses(tuple(self.context[:due_at])))
            self.judged = self.judged or several or self.answering or bool(start)
        state = start
        for token in self.context[due_at or begun :]:
            if state:
                wanted = (11, 12, 2)[state - 1]
                state = min(state + 1, 3) if token == wanted or not several else 1
                if state == 1 and several:
                    break  # a stray begins the refusal anew, and what follows it in this call is a draft
        self.state = state
        return due_at is not None, state


calls = st.lists(
    st.lists(st.sampled_from([(7, 8), (2,), (5,), (11, 12, 2), (11,), (7,), (8,)]), min_size=1, max_size=4).map(
        lambda parts: [token for part in parts for token in part]
    )
    | st.sampled_from([[5], [7], [8], [2], [11], [12]]),
    min_size=1,
    max_size=8,
)


@given(calls, st.integers(0, 3), st.booleans())
@settings(max_examples=400, deadline=None)
def test_the_rule_token_by_token(fed: list[list[int]], padding: int, harmful: bool) -> None:
    """What tensors say of a call is what the rule says token by token, under any padding on the left."""

    def refuses(context: tuple[int, ...]) -> bool:
        return harmful ^ (len(context) % 3 == 0)

    rule, kept, context = Rule(refuses), torch.zeros(1, 0, 3, dtype=torch.long), []
    for number, tokens in enumerate(fed):
        ids = torch.tensor([[0] * (padding if number == 0 else 0) + tokens])  # (1, tokens)
        symbols, real = TOKENS.in_ids(ids), ids != 0
        several = torch.tensor(ids.shape[1] > 1)
        earlier = torch.nn.functional.pad(kept, (0, 0, 2, 0))[:, -2:]  # (1, 2, 3)
        call = Call(symbols, real, earlier, several, several)
        due = find_due(call, TOKENS)
        judged = tuple(context + tokens[: int(due.at) + 1 - (ids.shape[1] - len(tokens))])
        refused = due.rows & torch.tensor([refuses(judged)])
        states, turns = follow(call, due, refused, TOKENS)
        context += tokens
        if number == 0 and padding and len(tokens) == 1:
            return  # a first call of padding and one token brings several
        assert (bool(due.rows), int(states[0, -1])) == rule.feed(tokens), fed
        kept = torch.cat([kept, torch.stack([states, turns, symbols], dim=-1)], dim=1)


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


def test_embeddings_are_recognised(guard: Guards) -> None:
    """Symbols read off embeddings are those of the ids."""
    guarded = guard("gemma3")
    words = TemplateTokens.of(guarded.model.config.sasa)
    ids = torch.arange(guarded.model.config.text_config.vocab_size)[None]  # (1, vocabulary)
    embedding = guarded.model.get_input_embeddings()
    with torch.no_grad():
        found = words.in_embeddings(embedding(ids), embedding(torch.tensor(words.table)))
    assert torch.equal(found, words.in_ids(ids))
