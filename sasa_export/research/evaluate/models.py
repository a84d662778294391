"""The models that answer and judge: in torch, the original or a patched directory with the code that it carries; in
onnxruntime, graphs, one prompt at a time, driven as any runtime drives them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sasa_export.errors import EvaluateError, reworded
from sasa_export.models import read_config
from sasa_export.models.load import SPREAD, place
from sasa_export.prompts.prompt import Prompt, encode, encoded
from sasa_export.verify import FORMATS
from sasa_export.verify.unloaded import dtype_of


class TorchModel:
    """A stock or a patched model, and its processor."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        ends = model.generation_config.eos_token_id
        self.ends = ends if isinstance(ends, list) else [ends]

    def answers(self, prompts: Sequence[Prompt], longest: int) -> dict[str, np.ndarray]:
        """Greedy `tokens` (prompts, longest), the end token included and -1 behind it; and `scores` (prompts,),
        P(unsafe), NaN where no verdict was given."""
        inputs = place(encode(self.processor, prompts), self.model)
        with torch.no_grad():
            said = self.model.generate(
                **inputs, max_new_tokens=longest, do_sample=False, num_beams=1, return_dict_in_generate=True
            )
        found = said["sequences"][:, inputs["input_ids"].shape[1] :].cpu().numpy()  # (batch, tokens)
        ends = np.isin(found, [end for end in self.ends if end is not None])  # (batch, tokens)
        tokens = np.full((len(prompts), longest), -1)
        tokens[:, : found.shape[1]] = np.where(ends.cumsum(1) > ends, -1, found)
        scores = said.get("unsafe_probability", torch.full((len(prompts),), torch.nan))  # (batch,)
        return {"tokens": tokens, "scores": scores.double().cpu().numpy()}

    def judge(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """P(unsafe), (prompts,)."""
        return self.model.judge(**place(encode(self.processor, prompts), self.model)).float().cpu().numpy()


class OnnxModel:
    """The same of the graphs of a directory."""

    def __init__(self, model: Any, directory: Path) -> None:
        self.model, self.processor, self.directory = model, model.processor, directory

    def answers(self, prompts: Sequence[Prompt], longest: int) -> dict[str, np.ndarray]:
        """As `TorchModel.answers`. EvaluateError where they would not answer as the original."""
        if self.model.about["not_followed"]:
            raise EvaluateError(
                f"generation_config.json of {self.directory} sets {', '.join(self.model.about['not_followed'])}, which "
                "is not followed here, so its answers would not be the original's. Evaluate the safetensors directory."
            )
        tokens, scores = np.full((len(prompts), longest), -1), np.zeros(len(prompts))
        for row, prompt in enumerate(prompts):
            scores[row], _, said = self.model.answer(encoded(self.processor, prompt), longest)
            tokens[row, : len(said)] = said
        return {"tokens": tokens, "scores": scores}

    def judge(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """P(unsafe), (prompts,)."""
        return np.array([self.model.judge(encoded(self.processor, prompt)) for prompt in prompts])


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


def load_patched(directory: Path, dtype: str, device: str) -> TorchModel | OnnxModel:
    """A patched directory's model, as a user loads it. Raises EvaluateError where it does not load.

    Args: dtype: as torch calls it, or auto, the one that is stored; graphs have theirs.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    graphs = dtype_of(directory)
    # The directory's code, and onnxruntime, have errors of their own.
    with reworded(EvaluateError, f"{directory} does not load ({{reason}}). Verify it: sasa-export verify {directory}"):
        if graphs is not None:
            from sasa_export.verify.fresh.onnx_model import Model
            from sasa_export.writers.onnx import SUFFIX

            provider = "cuda" if device.startswith("cuda") else "cpu"
            return OnnxModel(Model(directory, SUFFIX[graphs], provider), directory)
        from transformers import AutoModelForImageTextToText, AutoProcessor

        # What it would refuse is measured where it only observes, too.
        observes = read_config(directory)["sasa"].get("gate") == "observe"
        model = AutoModelForImageTextToText.from_pretrained(
            directory,
            dtype=dtype,
            device_map="auto" if device == SPREAD else device,
            trust_remote_code=True,
            use_safetensors=True,
            **({"sasa": {"gate": "enforce"}} if observes else {}),
        )
        processor = AutoProcessor.from_pretrained(directory, trust_remote_code=False)
        processor.tokenizer.padding_side = "left"
        return TorchModel(model.eval(), processor)
