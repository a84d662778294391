"""An ONNX directory behind the call of a torch model, so that the same loop drives both."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from onnx_runner import KINDS, Arrays, Runner
from torch import Tensor


class Past:
    """The arrays of a kept cache, (rows, heads, tokens, size) each, changed as a cache of transformers is."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays

    def crop(self, tokens: int) -> None:
        """Drop the last -tokens."""
        self.arrays = {name: array[:, :, :tokens] for name, array in self.arrays.items()}

    def batch_select_indices(self, rows: Tensor) -> None:
        self.arrays = {name: array[rows.numpy()] for name, array in self.arrays.items()}


class Graphs:
    """The three graphs; `image_token` is the id in whose places the pictures go."""

    def __init__(self, directory: Path, image_token: int) -> None:
        self.runner, self.image_token = Runner(directory), image_token
        self.optional = {value.name for value in self.runner.decoder.get_overridable_initializers()}

    def get_input_embeddings(self) -> Callable[[Tensor], Tensor]:
        return lambda ids: torch.from_numpy(self.runner.embed(ids.numpy()))

    def __call__(
        self,
        *,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Past | None = None,
        use_cache: bool = True,
        **further: Tensor,
    ) -> SimpleNamespace:
        """`logits` (rows, 1, vocabulary) and `past_key_values`, as transformers names them."""
        embeds = self._embedded(input_ids, further) if input_ids is not None else inputs_embeds.numpy()
        rows, tokens = embeds.shape[:2]
        feed = {name: further[name].numpy() for name in ("attention_mask", "position_ids")}
        feed |= {name: further[name][:, -tokens:].numpy() for name in self.optional if name in further}
        past = self._empty(rows) if past_key_values is None else past_key_values.arrays
        found = self.runner.decoder.run(self.runner.names, {"inputs_embeds": embeds, **feed, **past})
        values = dict(zip(self.runner.names, found, strict=True))
        present = {name.replace("present.", "past_key_values."): values[name] for name in values if "present." in name}
        return SimpleNamespace(logits=torch.from_numpy(values["logits"]), past_key_values=Past(present))

    def _empty(self, rows: int) -> Arrays:
        inputs = [value for value in self.runner.decoder.get_inputs() if value.name.startswith("past_key_values.")]
        return {one.name: np.zeros((rows, one.shape[1], 0, one.shape[3]), KINDS[one.type]) for one in inputs}

    def _embedded(self, ids: Tensor, further: dict[str, Tensor]) -> np.ndarray[Any, Any]:
        """Embeddings (rows, tokens, hidden) with the pictures in their places."""
        embeds = self.runner.embed(ids.numpy())
        if "pixel_values" in further:
            fed = {value.name: further[value.name].numpy() for value in self.runner.vision.get_inputs()}
            features = self.runner.vision.run(None, fed)[0]
            embeds[ids.numpy() == self.image_token] = features.reshape(-1, features.shape[-1])
        return embeds
