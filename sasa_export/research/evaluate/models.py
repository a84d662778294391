"""The models that answer and judge. `TorchModel` is the original, or a patched directory with its own code.
`OnnxModel` is graphs in onnxruntime: it runs one prompt at a time, as any driver does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sasa_export.errors import EvaluateError, reworded
from sasa_export.gate import GateSpec
from sasa_export.models import read_config
from sasa_export.models.load import SPREAD, place
from sasa_export.onnx import graphs_of
from sasa_export.prompts.prompt import Prompt, encode, encoded
from sasa_export.verify import FORMATS


class TorchModel:
    """A stock or a patched model in torch, and its processor."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        ends = model.generation_config.eos_token_id
        self.ends = ends if isinstance(ends, list) else [ends]

    def answers(self, prompts: Sequence[Prompt], longest: int) -> dict[str, np.ndarray]:
        """Return greedy `tokens` (prompts, longest), with the end token and -1 after it; and `scores` (prompts,),
        P(unsafe), NaN without a verdict."""
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
        """Return P(unsafe), (prompts,)."""
        return self.model.judge(**place(encode(self.processor, prompts), self.model)).float().cpu().numpy()


class OnnxModel:
    """The ONNX graphs of a directory, with the methods of `TorchModel`."""

    def __init__(self, model: Any, directory: Path) -> None:
        self.model, self.processor, self.directory = model, model.processor, directory

    def answers(self, prompts: Sequence[Prompt], longest: int) -> dict[str, np.ndarray]:
        """Return the same as `TorchModel.answers`. Raise EvaluateError for unsupported generation settings."""
        from sasa_export.verify.fresh.onnx_model import generation

        if changes := generation(self.directory)[1]:
            raise EvaluateError(
                f"generation_config.json of {self.directory} sets {', '.join(changes)}, which "
                "is not followed here, so its answers would not be the original's. Evaluate the safetensors directory."
            )
        tokens, scores = np.full((len(prompts), longest), -1), np.zeros(len(prompts))
        for row, prompt in enumerate(prompts):
            scores[row], _, said = self.model.answer(encoded(self.processor, prompt), longest)
            tokens[row, : len(said)] = said
        return {"tokens": tokens, "scores": scores}

    def judge(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Return P(unsafe), (prompts,)."""
        return np.array([self.model.judge(encoded(self.processor, prompt)) for prompt in prompts])


def read_gate(directory: Path) -> GateSpec:
    """Return the gate of a patched directory. Raise EvaluateError where it has no gate, OpenError for no model."""
    both = [directory / name for name in FORMATS]
    if not (directory / "config.json").exists() and all((path / "config.json").exists() for path in both):
        raise EvaluateError(f"{directory} holds two patched models. Give {both[0]} or {both[1]} instead.")
    sasa = read_config(directory).get("sasa")
    if not isinstance(sasa, dict):
        raise EvaluateError(
            f"{directory} is no patched model: its config.json has no gate. Patch it first: sasa-export --model "
            f"{directory} --out patched/."
        )
    with reworded(EvaluateError, f"{directory} has no usable gate ({{reason}})."):
        return GateSpec.from_json(sasa)


def load_patched(directory: Path, dtype: str, device: str) -> TorchModel | OnnxModel:
    """Load the model of a patched directory, as a user does. Raise EvaluateError where this fails.

    Args: dtype: torch's name of a dtype, or auto for the stored one. Graphs keep their own dtype.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # The directory's code and onnxruntime raise errors of their own types.
    with reworded(EvaluateError, f"{directory} does not load ({{reason}}). Verify it: sasa-export verify {directory}"):
        if graphs_of(directory):
            from sasa_export.onnx.run import Model

            return OnnxModel(Model(directory, "cuda" if device.startswith("cuda") else "cpu"), directory)
        from transformers import AutoModelForImageTextToText, AutoProcessor

        # A gate that only observes is measured as if it refused.
        model = AutoModelForImageTextToText.from_pretrained(
            directory,
            dtype=dtype,
            device_map="auto" if device == SPREAD else device,
            trust_remote_code=True,
            use_safetensors=True,
            **({"sasa": {"gate": "enforce"}} if read_gate(directory).observes else {}),
        )
        processor = AutoProcessor.from_pretrained(directory, trust_remote_code=False)
        processor.tokenizer.padding_side = "left"
        return TorchModel(model.eval(), processor)
