"""Register the patched types with transformers, when something is first loaded through its Auto classes.

Importing transformers takes seconds, which `sasa-export --help` must not, and registering imports model files that
import the Auto classes themselves. So this waits for the Auto classes, and then for their first use.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

AUTO = "transformers.models.auto.configuration_auto"


def register_when_needed() -> None:
    """Register at the first `AutoConfig.from_pretrained`, with which every loading begins."""
    if AUTO in sys.modules:
        _arm(sys.modules[AUTO])
    else:
        sys.meta_path.insert(0, _Waiting())


def _arm(module: Any) -> None:
    original = module.AutoConfig.from_pretrained

    @functools.wraps(original)
    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        module.AutoConfig.from_pretrained = original
        register()
        return original(*args, **kwargs)

    module.AutoConfig.from_pretrained = from_pretrained


def register() -> None:
    """Make one guarded configuration and model class for every model type of every family."""
    from transformers import AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    from sasa_export.models.family import families

    for family in families().values():
        for model_type in family.model_types:
            if model_type not in CONFIG_MAPPING:
                continue  # an older transformers does not know this family
            config_class = CONFIG_MAPPING[model_type]
            module = _module(config_class, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[config_class])
            guarded_config = getattr(module, f"Sasa{config_class.__name__}")
            guarded_model = getattr(module, f"Sasa{MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[config_class].__name__}")
            AutoModelForImageTextToText.register(guarded_config, guarded_model, exist_ok=True)


def _module(config_class: type, model_class: type) -> types.ModuleType:
    """The modeling file of a family as a module, its source at hand for `save_pretrained`."""
    from sasa_export.runtime.bundle import modeling_source

    name = f"sasa_export.runtime.guarded_{config_class.model_type}"  # type: ignore[attr-defined]
    if name not in sys.modules:
        loader = _Source(modeling_source(config_class, model_class))
        spec = importlib.util.spec_from_loader(name, loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        loader.exec_module(module)
    return sys.modules[name]


class _Source(importlib.abc.InspectLoader):
    def __init__(self, source: str) -> None:
        self.source = source

    def get_source(self, fullname: str) -> str:
        return self.source


class _Waiting(importlib.abc.MetaPathFinder):
    """Lets the Auto classes be imported as ever, and arms them right after."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            execute(module)
            _arm(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
