"""An ONNX directory behind the call of a torch model, so that the same loop drives both."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from feeding import CACHE
from onnx_runner import Arrays, Runner
from torch import Tensor


class Past:
    """The arrays of a kept cache, (rows, heads, tokens, size) each, changed as a cache of transformers is."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays

    def crop(self, tokens: int) -> None:
        """Drop the last -tokens."""
        self.arrays = {name: array[:, :, :tokens] for name, array in self.arrays.items()}


class Graphs:
    """The three graphs; `image_token` is the id in whose places the pictures go."""

    def __init__(self, directory: Path, image_token: int) -> None:
        self.runner, self.image_token = Runner(directory), image_token
        self.optional = {value.name for value in self.runner.decoder.get_overridable_initializers()}

    def get_input_embeddings(self) -> Callable[[Tensor], Tensor]:
        return lambda ids: torch.from_numpy(self.runner.embed(ids.numpy()))

    def __call__(self, **inputs: Any) -> SimpleNamespace:
        """`logits` (rows, 1, vocabulary) and the cache, as transformers names them."""
        past: Past | None = inputs.pop(CACHE, None)
        embeds = inputs["inputs_embeds"].numpy() if "inputs_embeds" in inputs else self._embedded(**inputs)
        self.runner.start(len(embeds))
        self.runner.cache = past.arrays if past else self.runner.cache
        further = {name: inputs[name][:, -embeds.shape[1] :].numpy() for name in self.optional & inputs.keys()}
        self.runner.call(embeds, inputs["attention_mask"].numpy(), inputs["position_ids"].numpy(), **further)
        logits = torch.from_numpy(self.runner.logits)[:, None]  # (rows, 1, vocabulary)
        return SimpleNamespace(logits=logits, **{CACHE: Past(self.runner.cache)})

    def _embedded(self, input_ids: Tensor, **inputs: Any) -> np.ndarray[Any, Any]:
        """Embeddings (rows, tokens, hidden) with the pictures in their places."""
        tensors = {"input_ids": input_ids, **{name: value for name, value in inputs.items() if torch.is_tensor(value)}}
        return self.runner.embed_prompt({name: value.numpy() for name, value in tensors.items()}, self.image_token)
