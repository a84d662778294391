"""A model in torch: the original, or a patched directory of safetensors with the code that it carries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sasa_export.errors import EvaluateError
from sasa_export.models import read_config
from sasa_export.models.load import SPREAD, place
from sasa_export.prompts.prompt import Prompt, encode
from sasa_export.research.evaluate.answer import Answer

AUTO = ("AutoConfig", "AutoModelForImageTextToText")


class TorchModel:
    """Answers greedily; `model` is a stock or a patched one, `tokens` the longest answer."""

    def __init__(self, model: Any, processor: Any, batch_size: int, tokens: int) -> None:
        self.model, self.processor, self.batch_size, self.tokens = model, processor, batch_size, tokens
        ends = model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])

    def answers(self, prompts: Sequence[Prompt]) -> list[Answer]:
        inputs = place(encode(self.processor, prompts), self.model)
        scores = [float("nan")] * len(prompts)

        def see(module: Any, args: Any, output: Any) -> None:
            for row, score in enumerate(_probabilities(output)):
                if scores[row] != scores[row]:
                    scores[row] = score

        handle = self.model.register_forward_hook(see)
        try:
            with torch.no_grad():
                found = self._generate(inputs, self.tokens)[:, inputs["input_ids"].shape[1] :]  # (batch, tokens)
        finally:
            handle.remove()
        said = [self._ended(tokens) for tokens in found.tolist()]
        texts = self.processor.tokenizer.batch_decode(said, skip_special_tokens=True)
        return [
            Answer(prompt.name, tuple(tokens), text, None if score != score else score)
            for prompt, tokens, text, score in zip(prompts, said, texts, scores, strict=True)
        ]

    def prepare(self, prompt: Prompt) -> Any:
        return place(encode(self.processor, [prompt]), self.model)

    def judge(self, inputs: Any) -> None:
        with torch.no_grad():
            self.model(**inputs, logits_to_keep=1)
        _finish(self.model)

    def begin(self, inputs: Any) -> None:
        with torch.no_grad():
            self._generate(inputs, 1)
        _finish(self.model)

    def _generate(self, inputs: Any, count: int) -> Any:
        return self.model.generate(**inputs, max_new_tokens=count, do_sample=False, num_beams=1)

    def _ended(self, tokens: list[int]) -> list[int]:
        """The tokens up to the first one that ends an answer; behind it is padding."""
        end = next((place for place, token in enumerate(tokens) if token in self.ends), len(tokens) - 1)
        return tokens[: end + 1]


def load_guarded(directory: Path, dtype: str, device: str) -> tuple[Any, Any]:
    """The patched model and its processor, by the directory's own code: what a user gets who has nothing of ours.

    Raises EvaluateError where it does not load.
    """
    from transformers import AutoConfig, AutoProcessor
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    described = read_config(directory)
    named, model_type = described.get("auto_map") or {}, described.get("model_type")
    registered = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else None
    device_map = "auto" if device == SPREAD else device
    try:
        config_class, model_class = (get_class_from_dynamic_module(named[name], str(directory)) for name in AUTO)
        config = config_class.from_pretrained(directory)
        model = model_class.from_pretrained(
            directory, config=config, dtype=getattr(torch, dtype), device_map=device_map, use_safetensors=True
        )
        processor = AutoProcessor.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # its code is a program of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise EvaluateError(
            f"{directory} does not load ({reason}). Verify it: sasa-export verify {directory}"
        ) from None
    finally:
        if registered is not None:  # the directory's code has put its own in its place, which is for this model alone
            AutoConfig.register(model_type, registered, exist_ok=True)
    processor.tokenizer.padding_side = "left"
    return model.eval(), processor


def _probabilities(output: Any) -> list[float]:
    """P(unsafe) of each row, NaN where no verdict is due; empty for an unguarded model."""
    found = getattr(output, "unsafe_probability", None)  # (batch,)
    return [] if found is None else found.float().tolist()


def _finish(model: Any) -> None:
    """Wait for the device, which may only have been told what to do."""
    if model.device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize()
