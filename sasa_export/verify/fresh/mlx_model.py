"""Runs a patched directory of safetensors in stock mlx-vlm."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_vlm
import numpy as np
from mlx_vlm.generate import generate_step


class Model:
    """The guarded model in mlx-vlm. It ignores `options` and `device`."""

    tensors = "np"

    def __init__(self, directory: Path, options: str, device: str) -> None:
        self.model, self.processor = mlx_vlm.load(str(directory))
        path = directory / "generation_config.json"
        told = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        changes = [name for name in ("repetition_penalty",) if told.get(name) not in (None, 1.0)]
        where = f"mlx-vlm {mlx_vlm.__version__} ({mx.default_device()})"
        self.about: dict[str, Any] = {"provider": where, "not_followed": changes}

    def answer(self, inputs: dict[str, Any], count: int) -> tuple[float, Any, list[int]]:
        """Return P(unsafe) of one prompt, the first logits (vocabulary,), and at most `count` tokens of the answer."""
        given = self._given(inputs)
        ids, pixels, mask = (given.pop(name, None) for name in ("input_ids", "pixel_values", "attention_mask"))
        end, said = self.model.language_model._sasa["refusal_token_ids"][-1], []
        for token, _ in generate_step(ids, self.model, pixels, mask, max_tokens=count, temperature=0.0, **given):
            said.append(int(token))
            if said[-1] == end:
                break
        output = self._call(inputs)
        first = np.array(output.logits[0, -1].astype(mx.float32))
        return float(output.unsafe_probability.item()), first, said

    def judge(self, inputs: dict[str, Any]) -> float:
        """Return P(unsafe) of one prompt."""
        return float(self._call(inputs).unsafe_probability.item())

    def _call(self, inputs: dict[str, Any]) -> Any:
        given = self._given(inputs)
        ids, mask = given["input_ids"], given.pop("attention_mask", None)
        found = self.model.get_input_embeddings(**{"pixel_values": None, **given, "mask": mask}).to_dict()
        return self.model.language_model(ids, **{name: value for name, value in found.items() if value is not None})

    def _given(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: mx.array(value) for name, value in inputs.items()}
