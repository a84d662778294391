"""Two checks after mlx-vlm has loaded a model, as modeling_sasa.py (runtime/proof.py) makes them in transformers."""

from typing import Any

import mlx.core as mx
import mlx_vlm
from mlx_vlm.generate import generate_step

from sasa_export.runtime.settings import tell_moved
from sasa_export.runtime_mlx.guard import logger

TRIED = ("0.7.10",)  # on another version a model proves its gate before it loads


def asked(model: Any, ask: Any, **settings: Any) -> Any:
    """Return what `ask` returns while these settings override config.sasa. Nothing is logged."""
    model.language_model._sasa_asked = settings
    try:
        return ask()
    finally:
        model.language_model._sasa_asked = {}


def recognise(model: Any, sasa: dict[str, Any]) -> None:
    """Warn if P(unsafe) of config.sasa's known prompts has moved. Raise ValueError if it moved far on average."""
    known = sasa.get("known") or []
    if not known or sasa.get("prove") is False:
        return

    def judge(entry: dict[str, Any]) -> float:
        ids = mx.array([[int(number) for number in entry["ids"].split()]])  # (1, tokens)
        given = model.get_input_embeddings(ids, None).to_dict()
        output = model.language_model(ids, **{name: value for name, value in given.items() if value is not None})
        return float(output.unsafe_probability.item())

    found = asked(model, lambda: [judge(entry) for entry in known], gate="observe")
    if said := tell_moved(found, known, 'set "prove": false in config.json'):
        logger.warning(said)


def prove(model: Any, sasa: dict[str, Any]) -> None:
    """Test the gate with a made-up prompt if mlx-vlm is not in TRIED; `prove` in config.sasa overrides this. Raise
    RuntimeError unless the refusal comes whole, and an allowed prompt gets the same tokens as without the gate."""
    wanted, refusal = sasa.get("prove"), sasa["refusal_token_ids"]
    if not (mlx_vlm.__version__ not in TRIED if wanted is None else wanted):
        return
    ids = mx.array([[*refusal[:-1], *sasa["generation_prompt_ids"]]])  # (1, tokens)

    def say() -> list[int]:
        return [int(token) for token, _ in generate_step(ids, model, None, None, max_tokens=len(refusal))]

    try:
        problem = "" if asked(model, say, threshold=0.0, gate="enforce") == refusal else "a refusal is cut short"
        if not problem and asked(model, say, threshold=2.0) != asked(model, say, unguarded=True):
            problem = "an allowed answer is not the original's"
    except Exception as error:  # for example where a name has changed
        problem = f"{type(error).__name__}: {error}"
    if problem:
        what = f"the gate of this guarded model does not hold on mlx-vlm {mlx_vlm.__version__} ({problem})"
        raise RuntimeError(f"{what}. Install one that it was tried on: pip install mlx-vlm=={TRIED[-1]}")
