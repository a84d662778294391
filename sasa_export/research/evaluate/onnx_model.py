"""A patched ONNX directory in onnxruntime, one prompt at a time, driven as any runtime drives it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sasa_export.errors import EvaluateError
from sasa_export.prompts.prompt import Prompt
from sasa_export.verify.fresh.onnx_model import Model
from sasa_export.writers.onnx import SUFFIX


class OnnxModel:
    """Answers greedily by the directory's three graphs; `tokens` is the longest answer."""

    def __init__(self, directory: Path, dtype: str, device: str, tokens: int) -> None:
        """EvaluateError where the graphs do not run on this machine, or would not answer as the original."""
        try:
            self.model = Model(directory, SUFFIX[dtype], "cuda" if device.startswith("cuda") else "cpu")
        except Exception as error:  # onnxruntime has errors of its own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise EvaluateError(
                f"the graphs in {directory} do not load ({reason}). Verify them: sasa-export verify {directory}"
            ) from None
        self.tokens = tokens
        if self.model.about["not_followed"]:
            raise EvaluateError(
                f"generation_config.json of {directory} sets {', '.join(self.model.about['not_followed'])}, which is "
                "not followed here, so its answers would not be the original's. Evaluate the safetensors directory."
            )

    def answers(self, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        """As `TorchModel.answers`."""
        tokens, scores = np.full((len(prompts), self.tokens), -1), np.zeros(len(prompts))
        for row, prompt in enumerate(prompts):
            scores[row], _, said = self.model.answer(self.prepare([prompt]), self.tokens)
            tokens[row, : len(said)] = said
        return {"tokens": tokens, "scores": scores}

    def prepare(self, prompts: Sequence[Prompt]) -> Any:
        """The graphs' inputs for one prompt."""
        return dict(
            self.model.processor.apply_chat_template(
                [prompt.conversation() for prompt in prompts], add_generation_prompt=True, tokenize=True,
                return_dict=True, processor_kwargs={"return_tensors": "np"},
            )
        )  # fmt: skip

    def judge(self, inputs: Any) -> None:
        """Run the prompt: the verdict is there with the first logits, and so is the first token."""
        self.model.judge(inputs)

    begin = judge
