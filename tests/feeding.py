"""Feeding a prompt to a guarded model in pieces."""

import random
from typing import Any

import tiny
import torch
from conftest import Guard
from torch import Tensor
from transformers import DynamicCache


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


def feed(guarded: Guard, inputs: dict[str, Any], ends: list[int]) -> Any:
    """Feed a prompt in pieces that end at `ends`; pictures come with the first. Returns the last call's output."""
    places = positions(guarded, inputs)  # (..., batch, tokens)
    by_token = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
    pictures = {name: value for name, value in inputs.items() if name not in by_token}
    cache = DynamicCache(config=guarded.stock.config) if guarded.family in tiny.GIVEN_CACHE else None
    start, found = 0, None
    for end in ends:
        piece: dict[str, Any] = {
            name: inputs[name][:, :end] for name in ("attention_mask", "token_type_ids") if name in inputs
        }
        for name in ("mm_token_type_ids", "moe_mm_token_type_ids"):  # which only tokens of a picture need
            if start == 0 and name in inputs:
                piece[name] = inputs[name][:, :end]
        piece |= {"input_ids": inputs["input_ids"][:, start:end], "position_ids": places[..., start:end]}
        found = guarded.model(**piece, **(pictures if start == 0 else {}), past_key_values=cache, use_cache=True)
        cache, start = found.past_key_values, end
    return found


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
