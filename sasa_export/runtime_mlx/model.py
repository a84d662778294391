"""The classes that mlx-vlm expects in a model file: the family's own, with the gate added, and checked at load."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_vlm
from mlx_vlm.generate import generate_step
from mlx_vlm.models.base import install_auto_processor_patch

from sasa_export.runtime.settings import HOW_TO_LOAD, check_settings, follow_refusal, logger, recognised, require_proof
from sasa_export.runtime_mlx.guard import Guarded

TRIED = ("0.7.10",)  # on another version a model proves its gate before it loads
DIRECTORY = Path(__file__).parent
CONFIG = json.loads((DIRECTORY / "config.json").read_text(encoding="utf-8"))
FAMILY = CONFIG["model_type"].removeprefix("sasa_")
stock = importlib.import_module(f"mlx_vlm.models.{FAMILY}")
globals().update({name: getattr(stock, name) for name in dir(stock) if name.endswith(("Config", "Model"))})


class ModelConfig(stock.ModelConfig):  # type: ignore[name-defined]
    """The family's configuration, with transformers 5's rotary and top-level settings where mlx-vlm reads them."""

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> Any:
        text, vision = {**params, **params["text_config"]}, params["vision_config"]
        rope = text.get("rope_parameters") or {}
        scaling = {"rope_scaling": {**rope, "type": "default"}} if "mrope_section" in rope else {}
        vision["model_type"] = vision.get("model_type", FAMILY).removesuffix("_vision")
        config = super().from_dict(params)
        params["text_config"] = {**scaling, **text, **rope}  # of which mlx-vlm makes the part's own configuration next
        return config


class Model(stock.Model):  # type: ignore[name-defined]
    """The family's model, with a guarded language model."""

    cast_predicate = staticmethod(lambda name: ".sasa." not in name)  # the probe stays in float32

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        config.model_type = FAMILY  # selects the prompt format in mlx-vlm
        settings = SimpleNamespace(sasa=check_settings(CONFIG.get("sasa")), image_token_id=CONFIG.get("image_token_id"))
        follow_refusal(settings, DIRECTORY)
        kind = type(self.language_model)
        self.language_model.__class__ = type(f"Guarded{kind.__name__}", (Guarded, kind), {})
        self.language_model.guard(settings.sasa)
        if FAMILY == "llava" and CONFIG["vision_config"].get("hidden_act") == "gelu":
            for block in self.vision_tower.vision_model.encoder.layers:  # mlx-vlm always uses CLIP's quick_gelu
                block.mlp.activation_fn = nn.GELU()

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        probe = {f"language_model.{name}": weights.pop(name) for name in list(weights) if name.startswith("sasa.")}
        weights = {**getattr(super(), "sanitize", dict)(weights), **probe}
        whole = CONFIG.get("dtype") == "float32" and "quantization" not in CONFIG  # as transformers loads it
        return {name: value.astype(mx.float32) if whole else value for name, value in weights.items()}

    def load_weights(self, *args: Any, **kwargs: Any) -> Any:
        probe = self.language_model.sasa.probe
        if mx.isfinite(probe.bias).item():
            raise ValueError("adapters and other weights change what the gate reads. Merge them first, and patch then.")
        super().load_weights(*args, **kwargs)
        if not (mx.isfinite(probe.weight).all() & mx.isfinite(probe.bias) & mx.any(probe.weight != 0)).item():
            raise ValueError(f"sasa.probe is missing, zero, NaN or infinite, so the gate cannot judge. {HOW_TO_LOAD}")
        check_gate(self, self.language_model)
        return self


def check_gate(model: Any, lane: Any) -> None:
    """Prove the gate of the language model `lane`, if mlx-vlm is not in TRIED: a made-up prompt is refused to the end,
    or answered as without the gate. Then judge config.sasa's known prompts. Raise RuntimeError or ValueError."""
    sasa, refusal = lane._sasa, lane._sasa["refusal_token_ids"]
    made_up = mx.array([[*refusal[:-1], *sasa["generation_prompt_ids"]]])  # (1, tokens)

    def say(**settings: Any) -> list[int]:
        lane._sasa_asked = settings
        return [int(token) for token, _ in generate_step(made_up, model, None, None, max_tokens=len(refusal))]

    def find_problem() -> str:
        if say(threshold=0.0, gate="enforce") != refusal:
            return "a refusal is cut short"
        return "" if say(threshold=2.0) == say(unguarded=True) else "an allowed answer is not the original's"

    def judge(numbers: list[int]) -> float:
        ids, lane._sasa_asked = mx.array([numbers]), {"gate": "observe"}  # (1, tokens)
        return float(lane(ids, **model.get_input_embeddings(ids, None).to_dict()).unsafe_probability.item())

    try:
        require_proof(find_problem, sasa, mlx_vlm, TRIED)
        if said := recognised(sasa, judge, 'set "prove": false in config.json'):
            logger.warning(said)
    finally:
        lane._sasa_asked = {}


def load_processor(directory: Any, **kwargs: Any) -> Any:
    """Load transformers' processor, or if that needs torch mlx-vlm's own. No code that auto_map names is run."""
    kwargs["trust_remote_code"] = False
    name = json.loads((Path(directory) / "processor_config.json").read_text(encoding="utf-8"))["processor_class"]
    try:
        return getattr(importlib.import_module("transformers"), name).from_pretrained(directory, **kwargs)
    except ImportError:
        own = next(getattr(module, name) for module in vars(stock).values() if hasattr(module, name))
        return own.from_pretrained(directory, **kwargs)


install_auto_processor_patch(CONFIG["model_type"], SimpleNamespace(from_pretrained=load_processor))
# mlx-vlm also looks for an image processor by the model type, and logs an error if none exists.
sys.modules.setdefault(f"mlx_vlm.models.{CONFIG['model_type']}", ModuleType(CONFIG["model_type"]))
