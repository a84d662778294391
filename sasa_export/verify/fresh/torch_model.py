"""Runs a patched directory of safetensors in plain transformers."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.quantizers.auto import AutoQuantizationConfig


class Model:
    """The guarded model, loaded with `options` in JSON. A `quantization_config` in them has config.json's format.

    `about` describes the model, and the result of attempts to load it without its gate.
    """

    tensors = "pt"

    def __init__(self, directory: Path, options: str, device: str) -> None:
        refused = bypasses(directory)  # before the directory's code registers its classes in this process
        self.processor = AutoProcessor.from_pretrained(directory, trust_remote_code=False)
        given = json.loads(options)
        if "quantization_config" in given:
            given["quantization_config"] = AutoQuantizationConfig.from_dict(given["quantization_config"])
        # Loading skips the proofs: changed weights raise no error, and the cases measure them. The gate is proved next.
        self.model = AutoModelForImageTextToText.from_pretrained(
            directory, trust_remote_code=True, device_map=device, sasa={"prove": False}, **given
        )
        code = sys.modules[type(self.model).__module__]
        self.model.config.sasa["prove"] = True
        code.prove(self.model, super(code.GuardedModel, self.model).generate)  # type: ignore[misc]
        self.about = {
            "provider": str(self.model.device),
            "not_followed": [],
            "bypasses": refused,
            "transformers": transformers.__version__,
            "model_class": type(self.model).__name__,
            "refusal_token_ids": self.model.config.sasa["refusal_token_ids"],  # includes an edited refusal
            "probe_dtype": str(self.model.sasa.probe.weight.dtype).removeprefix("torch."),
        }

    def answer(self, inputs: dict[str, Any], count: int) -> tuple[float, Any, list[int]]:
        """Return P(unsafe) of one prompt, the first logits (vocabulary,), and at most `count` tokens of the answer."""
        inputs = self._placed(inputs)
        with torch.no_grad():
            answer = self.model.generate(
                **inputs, max_new_tokens=count, do_sample=False, num_beams=1,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        tokens = answer.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        return self.judge(inputs), answer.logits[0][0].float().cpu().numpy(), tokens

    def judge(self, inputs: dict[str, Any]) -> float:
        """Return P(unsafe) of one prompt."""
        with torch.no_grad():
            return float(self.model(**self._placed(inputs)).unsafe_probability[0])

    def _placed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        device = self.model.device if self.model.device.type != "meta" else "cpu"  # the first weights may be on disk
        return {
            name: value.to(device, self.model.dtype) if value.is_floating_point() else value.to(device)
            for name, value in inputs.items()
        }


def bypasses(directory: Path) -> dict[str, str]:
    """Return ways to load the weights without the gate, each with the name of its error, or "loaded"."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    stock = getattr(transformers, config["architectures"][0].removeprefix("Sasa"))
    attempts = {
        "without trust_remote_code": partial(AutoModelForImageTextToText.from_pretrained, trust_remote_code=False),
        f"through {stock.__name__}": stock.from_pretrained,
    }
    outcomes = dict.fromkeys(attempts, "loaded")
    for name, load in attempts.items():
        try:
            load(directory)
        except Exception as error:  # any error means that it did not load
            outcomes[name] = type(error).__name__
    return outcomes
