"""Patched directories, loaded as a user loads them: with their own code in torch, or as graphs in onnxruntime."""

from pathlib import Path

import torch

from sasa_export.backends import Answering
from sasa_export.backends.torch_model import TorchModel
from sasa_export.errors import EvaluateError, reworded
from sasa_export.gate import GateSpec
from sasa_export.models import read_config
from sasa_export.models.load import SPREAD
from sasa_export.onnx import graphs_of
from sasa_export.verify import FORMATS


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


def load_patched(directory: Path, dtype: str, device: str) -> Answering:
    """Load the model of a patched directory, as a user does. Raise EvaluateError where this fails.

    Args: dtype: torch's name of a dtype, or auto for the stored one. Graphs keep their own dtype.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # The directory's code and onnxruntime raise errors of their own types.
    with reworded(EvaluateError, f"{directory} does not load ({{reason}}). Verify it: sasa-export verify {directory}"):
        if graphs_of(directory):
            from sasa_export.backends.onnx_graphs import OnnxModel
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
