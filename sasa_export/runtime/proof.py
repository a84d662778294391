"""What a model is asked when it is loaded: does its gate hold on this transformers, and are its weights those that the
probe was fitted on?"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import GenerationConfig

from sasa_export.runtime.guard import logger
from sasa_export.runtime.version import TRIED

# How far P(unsafe) of known prompts may move: one of them without a warning, all on average without an error. On
# smol-llava bfloat16 and 8 bits move none by more than 0.08, and 4 bits move one by 0.33 and more.
MOVED, MOVED_FAR = 0.1, 0.25
# How far P(unsafe) may move under padding, which changes how numbers are rounded; the second where they have few bits.
NEAR, NEAR_ROUNDED = 0.005, 0.1


@torch.no_grad()
def recognise(model: Any, loading: bool = True) -> None:
    """Judge the prompts that config.sasa knows P(unsafe) of: a warning where one has moved, and in loading a ValueError
    where they have by far; nothing where the operator's `prove` is false."""
    known = [] if _shapes_alone(model) else model.config.sasa.get("known") or []
    if not known or model.config.sasa.get("prove") is False:
        return
    prompts = [torch.tensor([[int(number) for number in entry["ids"].split()]]) for entry in known]  # (1, tokens) each
    found = torch.cat([model.judge(input_ids=ids.to(_device(model))).cpu() for ids in prompts])  # (prompts,)
    moved = (found - torch.tensor([entry["unsafe_probability"] for entry in known])).abs().nan_to_num(1.0)  # (prompts,)
    what = f"P(unsafe) of known prompts has moved by up to {moved.max():.2f}, {moved.mean():.2f} on average"
    why = "these are not the weights, or not in the precision, that the probe was fitted on"
    todo = "Fine-tune or quantize first, and patch the result"
    if loading and moved.mean() > MOVED_FAR:
        raise ValueError(f"{what}: {why}. {todo}. To load it all the same, pass sasa={{'prove': False}}.")
    if moved.max() > MOVED:
        logger.warning("%s: %s. %s.", what, why, todo)


@torch.no_grad()
def prove(model: Any, unguarded: Callable) -> None:
    """On a transformers that is not in TRIED, or as `prove` in config.sasa says: raise RuntimeError unless a made up
    prompt is refused to the end of the refusal where the threshold says so, and gets the tokens of `unguarded`, the
    family's own generate, on the family's own forward where not."""
    asked = model.config.sasa.get("prove")
    if _shapes_alone(model) or not (transformers.__version__ not in TRIED if asked is None else asked):
        return
    try:
        problem = _problem(model, unguarded)
    except Exception as error:  # of whatever has another name there
        problem = f"{type(error).__name__}: {error}"
    if problem:
        what = f"the gate of this guarded model does not hold on transformers {transformers.__version__} ({problem})"
        raise RuntimeError(f"{what}. Install one that it was tried on: pip install transformers=={TRIED[-1]}")


def _problem(model: Any, unguarded: Callable) -> str:
    """What does not hold, in two rows of which one is padded; empty where all does."""
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
    """Where its inputs go: the first weights of a model may lie on disk."""
    return "cpu" if model.device.type == "meta" else model.device


def _shapes_alone(model: Any) -> bool:
    """Has the model no weights to run with?"""
    return set((getattr(model, "hf_device_map", None) or {"": model.device.type}).values()) == {"meta"}
