"""The proof that the gate holds on a transformers that it was not tried on: asked of `generate` itself, on loading."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import transformers
from transformers import GenerationConfig

from sasa_export.runtime.version import TRIED

NEAR, NEAR_IN_HALF = 0.005, 0.1  # how far P(unsafe) may move under padding, which changes how numbers are rounded


@torch.no_grad()
def prove(model: Any, unguarded: Callable) -> None:
    """On a transformers that is not in TRIED, or as `prove` in config.sasa says: raise RuntimeError unless a made up
    prompt is refused to the end of the refusal where the threshold says so, and gets the tokens of `unguarded`, the
    family's own generate, on the family's own forward where not."""
    asked = model.config.sasa.get("prove")
    shapes_alone = set((getattr(model, "hf_device_map", None) or {"": model.device.type}).values()) == {"meta"}
    if shapes_alone or not (transformers.__version__ not in TRIED if asked is None else asked):
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
    device = "cpu" if model.device.type == "meta" else model.device  # the first weights may lie on disk
    ids = torch.tensor([[*refusal[:-1], *sasa["generation_prompt_ids"]]] * 2, device=device)  # (2, tokens)
    mask, padding = torch.ones_like(ids), len(refusal) // 2  # (2, tokens)
    mask[1, :padding] = 0
    options = GenerationConfig(max_new_tokens=len(refusal), eos_token_id=refusal[-1], pad_token_id=refusal[-1])

    def say(run: Callable, **settings: Any) -> list[list[int]]:
        with patch.object(model.sasa, "settings", {**sasa, **settings}):
            found = run(input_ids=ids, attention_mask=mask, generation_config=options)  # (2, tokens + refusal)
        return found[:, ids.shape[1] :].tolist()

    if say(model.generate, threshold=0.0, gate="enforce") != [refusal] * 2:
        return "a refusal is cut short"
    with patch.object(model, "forward", type(model).forward.__wrapped__.__get__(model)):
        original = say(unguarded)
    if say(model.generate, threshold=2.0) != original:
        return "an allowed answer is not the original's"
    padded, bare = model.judge(input_ids=ids, attention_mask=mask)[1], model.judge(input_ids=ids[1:, padding:])[0]
    near = NEAR if model.dtype == torch.float32 else NEAR_IN_HALF
    return "" if abs(padded - bare) < near else "padding changes a verdict"
