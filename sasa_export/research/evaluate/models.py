"""The two models that answer: in torch, the original or a patched directory with the code that it carries; in
onnxruntime, a patched directory of graphs, one prompt at a time, driven as any runtime drives it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sasa_export.errors import EvaluateError, reworded
from sasa_export.models import read_config
from sasa_export.models.load import SPREAD, place
from sasa_export.prompts.prompt import Prompt, encode
from sasa_export.verify import FORMATS


class TorchModel:
    """Answers greedily; `model` is a stock or a patched one, `tokens` the longest answer."""

    def __init__(self, model: Any, processor: Any, tokens: int) -> None:
        self.model, self.processor, self.tokens = model, processor, tokens
        ends = model.generation_config.eos_token_id
        self.ends = ends if isinstance(ends, list) else [ends]

    def answers(self, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        """`tokens` (prompts, longest), the end token included and -1 behind it; and `scores` (prompts,), P(unsafe),
        NaN where no verdict was given."""
        inputs = self.prepare(prompts)
        verdicts: list[np.ndarray] = []

        def see(module: Any, args: Any, output: Any) -> None:
            if getattr(output, "unsafe_probability", None) is not None:
                verdicts.append(output.unsafe_probability.float().cpu().numpy())  # (batch,), NaN where none is due

        handle = self.model.register_forward_hook(see)
        try:
            found = self._generate(inputs, self.tokens)[:, inputs["input_ids"].shape[1] :].cpu().numpy()
        finally:
            handle.remove()
        ends = np.isin(found, [end for end in self.ends if end is not None])  # (batch, tokens)
        tokens = np.full((len(prompts), self.tokens), -1)
        tokens[:, : found.shape[1]] = np.where(ends.cumsum(1) > ends, -1, found)
        calls = np.stack(verdicts or [np.full(len(prompts), np.nan)])  # (calls, batch)
        first = (~np.isnan(calls)).argmax(0)  # (batch,), the call that judged
        return {"tokens": tokens, "scores": calls[first, np.arange(len(prompts))].astype(float)}

    def prepare(self, prompts: Sequence[Prompt]) -> Any:
        """The model's inputs for a batch."""
        return place(encode(self.processor, prompts), self.model)

    def judge(self, inputs: Any) -> None:
        """Run the prompt: the verdict is there, and so are the first logits."""
        with torch.no_grad():
            self.model(**inputs, logits_to_keep=1)
        self._finish()

    def begin(self, inputs: Any) -> None:
        """Give the first token of the answer."""
        self._generate(inputs, 1)
        self._finish()

    @torch.no_grad()
    def _generate(self, inputs: Any, count: int) -> torch.Tensor:
        return self.model.generate(**inputs, max_new_tokens=count, do_sample=False, num_beams=1)

    def _finish(self) -> None:
        """Wait for the device, which may only have been told what to do."""
        if self.model.device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize()


class OnnxModel:
    """The same of a directory of graphs. EvaluateError where they do not run here, or would not answer alike."""

    def __init__(self, directory: Path, dtype: str, device: str, tokens: int) -> None:
        self.model, self.tokens = load_graphs(directory, dtype, device), tokens
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
        return {name: tensor.numpy() for name, tensor in encode(self.model.processor, prompts).items()}

    def judge(self, inputs: Any) -> None:
        """Run the prompt: the verdict is there with the first logits, and so is the first token."""
        self.model.judge(inputs)

    begin = judge


def read_gate(directory: Path) -> dict[str, Any]:
    """The settings of a patched directory's gate. Raises EvaluateError where it has none, OpenError for no model."""
    both = [directory / name for name in FORMATS]
    if not (directory / "config.json").exists() and all((path / "config.json").exists() for path in both):
        raise EvaluateError(f"{directory} holds two patched models. Give {both[0]} or {both[1]} instead.")
    sasa = read_config(directory).get("sasa")
    if not isinstance(sasa, dict):
        raise EvaluateError(
            f"{directory} is no patched model: its config.json has no gate. Patch it first: sasa-export --model "
            f"{directory} --out patched/."
        )
    return sasa


def load_graphs(directory: Path, dtype: str, device: str) -> Any:
    """The graphs of an ONNX directory, of this type. Raises EvaluateError where they do not load."""
    from sasa_export.verify.fresh.onnx_model import Model
    from sasa_export.writers.onnx import SUFFIX

    with _loading(directory):
        return Model(directory, SUFFIX[dtype], "cuda" if device.startswith("cuda") else "cpu")


def load_patched(directory: Path, dtype: str, device: str) -> tuple[Any, Any]:
    """The patched model and its processor, as a user loads them. Raises EvaluateError where it does not load.

    Args: dtype: as torch calls it, or auto: the one that is stored.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    # What it would refuse is measured where it only observes, too.
    observes = read_config(directory)["sasa"].get("gate") == "observe"
    enforcing = {"sasa": {"gate": "enforce"}} if observes else {}
    with _loading(directory):
        model = AutoModelForImageTextToText.from_pretrained(
            directory,
            dtype=dtype,
            device_map="auto" if device == SPREAD else device,
            trust_remote_code=True,
            use_safetensors=True,
            **enforcing,
        )
        processor = AutoProcessor.from_pretrained(directory, trust_remote_code=False)
    processor.tokenizer.padding_side = "left"
    return model.eval(), processor


def _loading(directory: Path) -> AbstractContextManager[None]:
    """EvaluateError for whatever goes wrong: the directory's code, and onnxruntime, have errors of their own."""
    return reworded(EvaluateError, f"{directory} does not load ({{reason}}). Verify it: sasa-export verify {directory}")
