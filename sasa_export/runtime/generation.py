"""What a decoding loop of transformers is at."""

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache


@dataclass(frozen=True)
class Generation:
    """What a decoding loop of transformers is at."""

    cache: Cache | None
    prompt_end: int


current_generation: contextvars.ContextVar[Generation | None] = contextvars.ContextVar("generation", default=None)


@contextlib.contextmanager
def generating(input_ids: torch.Tensor, kwargs: dict[str, Any]) -> Iterator[None]:
    """Within this context, a decoding loop feeds its prompt and then its answer, to one cache."""
    given = (input_ids, kwargs.get("attention_mask"), kwargs.get("inputs_embeds"))
    end = max(value.shape[1] for value in given if isinstance(value, torch.Tensor) and value.dim() > 1)
    token = current_generation.set(Generation(kwargs.get("past_key_values"), end))
    try:
        yield
    finally:
        current_generation.reset(token)
