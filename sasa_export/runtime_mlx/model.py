"""The classes that mlx-vlm expects in a model file: the family's own, with the gate added."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_vlm.models.base import install_auto_processor_patch

from sasa_export.runtime.settings import HOW_TO_LOAD, check_settings, follow_refusal
from sasa_export.runtime_mlx.guard import Guarded
from sasa_export.runtime_mlx.proof import prove, recognise

DIRECTORY = Path(__file__).parent
CONFIG = json.loads((DIRECTORY / "config.json").read_text(encoding="utf-8"))
FAMILY = CONFIG["model_type"].removeprefix("sasa_")
stock = importlib.import_module(f"mlx_vlm.models.{FAMILY}")
globals().update({name: getattr(stock, name) for name in dir(stock) if name.endswith(("Config", "Model"))})


class TextConfig(stock.TextConfig):  # type: ignore[name-defined]
    """The family's text configuration. It also reads transformers 5's rotary and top-level text settings."""

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> Any:
        params = {**params, **(params.get("text_config") or {})}
        rope = params.get("rope_parameters") or {}
        if "mrope_section" in rope:
            params = {"rope_scaling": {**rope, "type": "default"}, **params}
        return super().from_dict({**params, **{name: rope[name] for name in ("rope_theta",) if name in rope}})


class VisionConfig(stock.VisionConfig):  # type: ignore[name-defined]
    """The family's vision configuration, with the model type that it has in mlx-vlm."""

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> Any:
        return super().from_dict({**params, "model_type": params.get("model_type", FAMILY).removesuffix("_vision")})


class Model(stock.Model):  # type: ignore[name-defined]
    """The family's model, with a guarded language model."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        config.model_type = FAMILY  # selects the prompt format in mlx-vlm
        settings = SimpleNamespace(sasa=check_settings(CONFIG.get("sasa")), image_token_id=CONFIG.get("image_token_id"))
        follow_refusal(settings, DIRECTORY)
        kind = type(self.language_model)
        self.language_model.__class__ = type(f"Guarded{kind.__name__}", (Guarded, kind), {})
        self.language_model.guard(settings.sasa)
        self._sasa_loaded = False
        if FAMILY == "llava" and CONFIG["vision_config"].get("hidden_act") == "gelu":
            for block in self.vision_tower.vision_model.encoder.layers:  # mlx-vlm always uses CLIP's quick_gelu
                block.mlp.activation_fn = nn.GELU()

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        own = getattr(super(), "sanitize", lambda found: found)
        probe = {f"language_model.{name}": weights.pop(name) for name in list(weights) if name.startswith("sasa.")}
        weights = {**own(weights), **probe}
        if CONFIG.get("dtype") == "float32" and "quantization" not in CONFIG:  # as transformers loads it
            weights = {name: value.astype(mx.float32) for name, value in weights.items()}
        return weights

    def load_weights(self, *args: Any, **kwargs: Any) -> Any:
        if self._sasa_loaded:
            raise ValueError("adapters and other weights change what the gate reads. Merge them first, and patch then.")
        super().load_weights(*args, **kwargs)
        self._sasa_loaded, probe = True, self.language_model.sasa.probe
        if not (mx.isfinite(probe.weight).all() & mx.isfinite(probe.bias) & mx.any(probe.weight != 0)).item():
            raise ValueError(f"sasa.probe is missing, zero, NaN or infinite, so the gate cannot judge. {HOW_TO_LOAD}")
        prove(self, self.language_model._sasa)
        recognise(self, self.language_model._sasa)
        return self

    @property
    def cast_predicate(self) -> Any:
        return lambda name: ".sasa." not in name  # the probe stays in float32


class Processor:
    """Loads transformers' processor, or if that needs torch mlx-vlm's own. It never runs code that auto_map names."""

    @staticmethod
    def from_pretrained(directory: Any, **kwargs: Any) -> Any:
        kwargs["trust_remote_code"] = False
        name = json.loads((Path(directory) / "processor_config.json").read_text(encoding="utf-8"))["processor_class"]
        try:
            return getattr(importlib.import_module("transformers"), name).from_pretrained(directory, **kwargs)
        except ImportError:
            own = next(getattr(module, name) for module in vars(stock).values() if hasattr(module, name))
            return own.from_pretrained(directory, **kwargs)


install_auto_processor_patch(CONFIG["model_type"], Processor)
# mlx-vlm also looks for an image processor by the model type, and logs an error if none exists.
sys.modules.setdefault(f"mlx_vlm.models.{CONFIG['model_type']}", ModuleType(CONFIG["model_type"]))
