"""A patched ONNX directory in onnxruntime, one prompt at a time, driven as any runtime drives it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sasa_export.errors import EvaluateError
from sasa_export.prompts.prompt import Prompt
from sasa_export.verify.onnx_fresh import CHANGES, Graphs
from sasa_export.writers.onnx import SUFFIX


class OnnxModel:
    """Answers greedily by the directory's three graphs; `tokens` is the longest answer."""

    def __init__(self, directory: Path, dtype: str, device: str, tokens: int) -> None:
        """EvaluateError where the graphs do not run on this machine, or would not answer as the original."""
        from transformers import AutoProcessor

        try:
            self.graphs = Graphs(directory, SUFFIX[dtype], "cuda" if device.startswith("cuda") else "cpu")
            self.processor = AutoProcessor.from_pretrained(directory, trust_remote_code=False)
        except Exception as error:  # onnxruntime has errors of its own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise EvaluateError(
                f"the graphs in {directory} do not load ({reason}). Verify them: sasa-export verify {directory}"
            ) from None
        self.tokens = tokens
        path = directory / "generation_config.json"
        settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        ends = settings.get("eos_token_id", self.processor.tokenizer.eos_token_id)
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self.penalty = float(settings.get("repetition_penalty") or 1.0)
        changes = [name for name, idle in CHANGES.items() if settings.get(name, idle) not in (idle, None)]
        if changes:
            raise EvaluateError(
                f"generation_config.json of {directory} sets {', '.join(sorted(changes))}, which is not followed here, "
                "so its answers would not be the original's. Evaluate the safetensors directory."
            )

    def answers(self, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        """As `TorchModel.answers`."""
        tokens, scores = np.full((len(prompts), self.tokens), -1), np.zeros(len(prompts))
        for row, prompt in enumerate(prompts):
            scores[row], _, said = self._answer(self.prepare([prompt]), self.tokens)
            tokens[row, : len(said)] = said
        return {"tokens": tokens, "scores": scores}

    def prepare(self, prompts: Sequence[Prompt]) -> Any:
        """The graphs' inputs for one prompt."""
        return dict(
            self.processor.apply_chat_template(
                [prompt.conversation() for prompt in prompts],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                processor_kwargs={"return_tensors": "np"},
            )
        )

    def judge(self, inputs: Any) -> None:
        """Run the prompt: the verdict is there with the first logits, and so is the first token."""
        self._answer(inputs, 1)

    begin = judge

    def _answer(self, inputs: Any, count: int) -> Any:
        return self.graphs.answer(inputs, count, self.ends, self.penalty)
