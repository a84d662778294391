"""Two checks of a model at load: that its gate works on this transformers, and that its weights are those that the
probe was fitted on."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import GenerationConfig

from sasa_export.runtime.guard import logger
from sasa_export.runtime.settings import tell_moved
from sasa_export.runtime.version import TRIED

# How far P(unsafe) may move under padding, which changes rounding: in unquantized float32, and in all other types.
NEAR, NEAR_ROUNDED = 0.005, 0.1


@torch.no_grad()
def recognise(model: Any, loading: bool = True) -> None:
    """Judge the prompts whose P(unsafe) config.sasa records, and log a warning where one has moved. While `loading`,
    raise ValueError where they moved far on average. Do nothing if the operator's `prove` is false."""
    known = [] if _shapes_alone(model) else model.config.sasa.get("known") or []
    if not known or model.config.sasa.get("prove") is False:
        return
    prompts = [torch.tensor([[int(number) for number in entry["ids"].split()]]) for entry in known]  # (1, tokens) each
    found = torch.cat([model.judge(input_ids=ids.to(_device(model))).cpu() for ids in prompts])  # (prompts,)
    if said := tell_moved(found.tolist(), known, "pass sasa={'prove': False}" if loading else ""):
        logger.warning(said)


@torch.no_grad()
def prove(model: Any, unguarded: Callable) -> None:
    """Test the gate with a made-up prompt if transformers is not in TRIED; `prove` in config.sasa overrides this. Raise
    RuntimeError unless the refusal comes whole, padding keeps the verdict, and an allowed prompt gets the same tokens
    as from `unguarded`: the family's own generate, on the family's own forward."""
    asked = model.config.sasa.get("prove")
    if _shapes_alone(model) or not (transformers.__version__ not in TRIED if asked is None else asked):
        return
    try:
        problem = _problem(model, unguarded)
    except Exception as error:  # for example where a name has changed
        problem = f"{type(error).__name__}: {error}"
    if problem:
        what = f"the gate of this guarded model does not hold on transformers {transformers.__version__} ({problem})"
        raise RuntimeError(f"{what}. Install one that it was tried on: pip install transformers=={TRIED[-1]}")


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
