"""A patched ONNX directory in onnxruntime, one prompt at a time, driven as any runtime drives it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sasa_export.errors import EvaluateError
from sasa_export.prompts.prompt import Prompt
from sasa_export.research.evaluate.answer import Answer
from sasa_export.verify.onnx import runs_here
from sasa_export.verify.onnx_fresh import CHANGES, Graphs
from sasa_export.writers.onnx import SUFFIX

BATCH = 1  # prompts at a time


class OnnxModel:
    """Answers greedily by the directory's three graphs."""

    batch_size = BATCH

    def __init__(self, directory: Path, dtype: str, device: str, tokens: int) -> None:
        """EvaluateError where the graphs do not run on this machine."""
        from transformers import AutoProcessor

        if not runs_here(dtype):
            raise EvaluateError(
                f"the {dtype} graphs in {directory} need onnxruntime's CUDA provider, and there is none."
            )
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

    def answers(self, prompts: Sequence[Prompt]) -> list[Answer]:
        found = []
        for prompt in prompts:
            score, _, tokens = self.graphs.answer(self.prepare(prompt), self.tokens, self.ends, self.penalty)
            text = self.processor.tokenizer.decode(tokens, skip_special_tokens=True)
            found.append(Answer(prompt.name, tuple(tokens), text, None if score != score else float(score)))
        return found

    def prepare(self, prompt: Prompt) -> Any:
        return dict(
            self.processor.apply_chat_template(
                [prompt.conversation()],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                processor_kwargs={"return_tensors": "np"},
            )
        )

    def judge(self, inputs: Any) -> None:
        self.graphs.answer(inputs, 1, self.ends, self.penalty)

    begin = judge  # the verdict is there with the first logits
