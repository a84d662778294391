"""Calling a model by hand, as a server does: pieces of a prompt on one cache, then the answer token by token."""

import inspect
import random
from itertools import pairwise
from typing import Any

import tiny
import torch
from conftest import Guard
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration

TOKENS = 14  # more than the refusal has
# What a cache is called, as an argument and in outputs: until transformers 5.23 by the second name.
NAMES = ("cache", "past_key_values")
CACHE = next(name for name in NAMES if name in inspect.signature(LlavaForConditionalGeneration.forward).parameters)
PICTURED = ("mm_token_type_ids", "moe_mm_token_type_ids")  # which tokens belong to pictures
PER_TOKEN = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", *PICTURED)


def positions(guarded: Guard, inputs: dict[str, Any]) -> Tensor:
    """The position ids of a prompt: (batch, tokens), or (3, batch, tokens) where a family has three axes."""
    mask = inputs["attention_mask"]  # (batch, tokens)
    flat = (mask.cumsum(-1) - 1).clamp_min(0)  # (batch, tokens)
    model = getattr(guarded.stock, "model", guarded.stock)
    if not hasattr(model, "get_rope_index"):
        return flat
    if "pixel_values" not in inputs:
        return flat.expand(3, -1, -1)
    names = ("mm_token_type_ids", "image_grid_thw", "target_sizes")
    known = {name: inputs[name] for name in names if name in inputs}
    found, _ = model.get_rope_index(inputs["input_ids"], attention_mask=mask, **known)
    return found


class Loop:
    """A batch of rows on one cache, of a torch model or of graphs, beside the guard that they belong to.

    `output` is the last call's, and `logits` its last ones, (rows, vocabulary).
    """

    def __init__(self, guarded: Guard, model: Any, cache: Any = None) -> None:
        self.guarded, self.model, self.cache = guarded, model, cache
        self.mask: Tensor | None = None  # (rows, context)
        self.types: Tensor | None = None  # (rows, context), for families that tell pictures from text by it
        self.next: Tensor | None = None  # (rows, 1) or (axes, rows, 1), the position that comes next

    def feed(self, piece: dict[str, Any]) -> "Loop":
        """One call: input_ids (rows, tokens) or inputs_embeds (rows, tokens, hidden), and what belongs to them."""
        fed = piece["inputs_embeds"] if "inputs_embeds" in piece else piece["input_ids"]
        mask = piece.get("attention_mask", torch.ones(fed.shape[:2], dtype=torch.int64))  # (rows, tokens)
        start = self._first(len(fed)) if self.next is None else self.next
        call = {"position_ids": start + torch.arange(fed.shape[1]), **piece}  # (..., rows, tokens)
        self.next = torch.maximum(start, call["position_ids"].amax(-1, keepdim=True) + 1)
        if self.guarded.family == "gemma3":
            types = piece.get("token_type_ids", torch.zeros_like(mask))  # (rows, tokens)
            call["token_type_ids"] = self.types = types if self.types is None else torch.cat([self.types, types], dim=1)
        if self.mask is not None:
            mask = torch.cat([self.mask, mask], dim=1)
            call = {name: value for name, value in call.items() if name not in PICTURED}
        call["attention_mask"] = self.mask = mask
        self.output = self.model(**call, **{CACHE: self.cache}, use_cache=True)
        self.cache, self.logits = getattr(self.output, CACHE), self.output.logits[:, -1]
        return self

    def _first(self, rows: int) -> Tensor:
        """Where positions begin, (rows, 1) or (axes, rows, 1)."""
        axes = (3,) if hasattr(getattr(self.guarded.stock, "model", None), "get_rope_index") else ()
        return torch.zeros((*axes, rows, 1), dtype=torch.int64)

    def feed_pieces(self, inputs: dict[str, Any], ends: list[int]) -> "Loop":
        """A processor's prompt in pieces that end at `ends`; pictures come with the first."""
        inputs = {"position_ids": positions(self.guarded, inputs), **inputs}
        if "inputs_embeds" in inputs:
            del inputs["input_ids"]
        for start, end in pairwise([0, *ends]):
            piece = {name: value[:, start:end] for name, value in inputs.items() if name in PER_TOKEN}
            piece["position_ids"] = inputs["position_ids"][..., start:end]
            self.feed(piece if start else inputs | piece)
        return self

    def feed_prompt(
        self, inputs: dict[str, Any], size: int | None = None, *, last: int = 0, embedded: bool = False
    ) -> "Loop":
        """A processor's prompt in pieces of `size` tokens behind its pictures, or in two with `last` tokens in the
        second, or whole."""
        tokens, first = inputs["input_ids"].shape[1], last_picture_token(self.guarded, inputs)
        if embedded:
            embeds = self.model.get_input_embeddings()(inputs["input_ids"])  # (rows, tokens, hidden)
            inputs = {**inputs, "inputs_embeds": embeds}
        step = size or (tokens - last)
        return self.feed_pieces(inputs, [*(end for end in range(step, tokens, step) if end >= first), tokens])

    def say(self, count: int = TOKENS, *, embedded: bool = False, until: set[int] | None = None) -> Tensor:
        """Greedy tokens (rows, up to `count`), each fed as it is said; ends sooner where all say one of `until`."""
        said = []
        for _ in range(count):
            said.append(self.logits.argmax(-1, keepdim=True))  # (rows, 1)
            name, fed = "input_ids", said[-1]
            if embedded:
                name, fed = "inputs_embeds", self.model.get_input_embeddings()(fed)  # (rows, 1, hidden)
            self.feed({name: fed})
            if until is not None and until.issuperset(said[-1][:, 0].tolist()):
                break
        return torch.cat(said, dim=1)

    def crop(self, dropped: int) -> "Loop":
        """Forget the last tokens."""
        assert self.mask is not None and self.next is not None
        self.cache.crop(-dropped)
        length = self.mask.shape[1] - dropped
        self.mask, self.next = self.mask[:, :length], self.next - dropped
        self.types = None if self.types is None else self.types[:, :length]
        return self


def feed(guarded: Guard, inputs: dict[str, Any], ends: list[int]) -> Any:
    """Feed a prompt to a guarded model in pieces that end at `ends`. Returns the last call's output."""
    cache = DynamicCache(config=guarded.stock.config) if guarded.family in tiny.GIVEN_CACHE else None
    return Loop(guarded, guarded.model, cache).feed_pieces(inputs, ends).output


def chunkings(tokens: int, first: int, count: int) -> list[list[int]]:
    """Ways to cut a prompt, the first piece at least `first` tokens.

    The first of them gives one token at a time, and the second a last token alone; others are random.
    """
    draw = random.Random(1)
    ways = [[*range(first, tokens + 1)], [tokens - 1, tokens]]
    while len(ways) < count:
        share = draw.choice((0.05, 0.2, 0.5))
        ends = [end for end in range(first, tokens) if draw.random() < share]
        ways.append([*ends, tokens])
    return ways


def last_picture_token(guarded: Guard, inputs: dict[str, Any]) -> int:
    """How many tokens of a batch reach to the end of its last picture, with the marks around it that come from it."""
    config = guarded.model.config
    token = getattr(config, "image_token_id", None) or config.image_token_index
    tokens = torch.tensor([token, *getattr(config, "visual_indicator_token_ids", ())])
    pictures = inputs.get("moe_mm_token_type_ids", torch.isin(inputs["input_ids"], tokens))  # (batch, tokens)
    columns = pictures.any(dim=0).nonzero()  # (columns, 1)
    return int(columns.max()) + 1 if len(columns) else 1
