"""Two checks of a model at load: that its gate works on this transformers, and that its weights are those that the
probe was fitted on."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import GenerationConfig

from sasa_export.runtime.settings import logger, recognised, require_proof
from sasa_export.runtime.version import TRIED

# How far P(unsafe) may move under padding, which changes rounding: in unquantized float32, and in all other types.
NEAR, NEAR_ROUNDED = 0.005, 0.1


@torch.no_grad()
def recognise(model: Any, loading: bool = True) -> None:
    """Judge the prompts whose P(unsafe) config.sasa records, and log a warning where one has moved. While `loading`,
    raise ValueError where they moved far on average."""

    def judge(ids: list[int]) -> float:
        return float(model.judge(input_ids=torch.tensor([ids], device=_device(model))))

    if _shapes_alone(model):
        return
    if said := recognised(model.config.sasa, judge, "pass sasa={'prove': False}" if loading else ""):
        logger.warning(said)


@torch.no_grad()
def prove(model: Any, unguarded: Callable) -> None:
    """Test the gate with a made-up prompt if transformers is not in TRIED, or as `prove` in config.sasa says. Raise
    RuntimeError unless the refusal comes whole, padding keeps the verdict, and an allowed prompt gets the same tokens
    as from `unguarded`: the family's own generate, on the family's own forward."""
    if not _shapes_alone(model):
        require_proof(lambda: _problem(model, unguarded), model.config.sasa, transformers, TRIED)


def _problem(model: Any, unguarded: Callable) -> str:
    """Return what fails, tested on two rows, one of them padded. Return an empty string if nothing does."""
    sasa, refusal = model.config.sasa, model.config.sasa["refusal_token_ids"]
    ids = torch.tensor([[*refusal[:-1], *sasa["generation_prompt_ids"]]] * 2, device=_device(model))  # (2, tokens)
    mask, padding = torch.ones_like(ids), len(refusal) // 2  # (2, tokens)
    mask[1, :padding] = 0
    options = GenerationConfig(max_new_tokens=len(refusal), eos_token_id=refusal[-1], pad_token_id=refusal[-1])

    def say(run: Callable, **settings: Any) -> list[list[int]]:
        model.sasa.asked = settings
        try:
            found = run(input_ids=ids, attention_mask=mask, generation_config=options)  # (2, tokens + refusal)
        finally:
            model.sasa.asked = {}
        return found[:, ids.shape[1] :].tolist()

    if say(model.generate, threshold=0.0, gate="enforce") != [refusal] * 2:
        return "a refusal is cut short"
    original = say(unguarded, unguarded=True)
    if say(model.generate, threshold=2.0) != original:
        return "an allowed answer is not the original's"
    padded, bare = model.judge(input_ids=ids, attention_mask=mask)[1], model.judge(input_ids=ids[1:, padding:])[0]
    rounded = model.dtype != torch.float32 or getattr(model.config, "quantization_config", None) is not None
    near = NEAR_ROUNDED if rounded else NEAR
    return "" if abs(padded - bare) < near else "padding changes a verdict"


def _device(model: Any) -> Any:
    """Return the device for inputs, the CPU if the model's first weights lie on disk."""
    return "cpu" if model.device.type == "meta" else model.device


def _shapes_alone(model: Any) -> bool:
    """Return whether the model has only shapes, without weights to run with."""
    return set((getattr(model, "hf_device_map", None) or {"": model.device.type}).values()) == {"meta"}
