"""The classes that a family's stock classes are mixed with."""

import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from sasa_export.runtime.generation import generating
from sasa_export.runtime.judge import PACKED, Judging
from sasa_export.runtime.nodes import HOW_TO_LOAD, lane_entries
from sasa_export.runtime.probe import Probe
from sasa_export.runtime.seal import SEAL
from sasa_export.runtime.settings import check_settings
from sasa_export.runtime.watch import watch


class GuardedModel(Judging):
    """Mixed into a family's ...ForConditionalGeneration: judges each prompt, then lets it answer or refuses."""

    _keep_in_fp32_modules_strict = ("sasa",)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if GuardedModel not in cls.__bases__:  # a subclass of a guarded class inherits its gate
            return
        family = cls.__bases__[cls.__bases__.index(GuardedModel) + 1]  # the stock class
        cls.forward = _guarded(family.forward)
        if not hasattr(family.__init__, "sealed_by_sasa"):
            family.__init__ = _sealed(family.__init__)
        stock, own = family.config_class.model_type, cls.config_class.model_type
        mapping = get_checkpoint_conversion_mapping(family.__name__) or get_checkpoint_conversion_mapping(stock)
        if mapping is not None:  # old names in the shards are renamed as for the stock class
            register_checkpoint_conversion_mapping(own, mapping, overwrite=True)

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        text = config.get_text_config(decoder=True)
        settings = check_settings(getattr(config, "sasa", None))
        if sum(node["op"] == "block" for node in settings["graph"]) != text.num_hidden_layers:
            raise ValueError(f"config.sasa's graph has not as many blocks as the decoder. {HOW_TO_LOAD}")
        if not all(0 <= token < text.vocab_size for token in settings["refusal_token_ids"]):
            raise ValueError(f"config.sasa's refusal has tokens outside the vocabulary. {HOW_TO_LOAD}")
        features = text.vocab_size if settings.get("probe_space") == "logits" else text.hidden_size
        features *= len(lane_entries(settings["graph"]))
        self.sasa = nn.Module()
        self.sasa.probe = Probe(features)
        watch(self, settings["graph"])
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info.get(problem):
                names = sorted(str(name) for name in info[problem])
                raise ValueError(
                    f"{problem.replace('_', ' ')} in the guarded model: {', '.join(names[:5])}"
                    f"{' ...' if len(names) > 5 else ''} ({len(names)} in all). {HOW_TO_LOAD}"
                )
        model.sasa.probe.check()
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)
        owner = next(cls for cls in type(self).__mro__ if GuardedModel in cls.__bases__)
        spec = sys.modules[owner.__module__].__spec__
        Path(save_directory, "modeling_sasa.py").write_text(spec.loader.get_source(spec.name), encoding="utf-8")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        given = [value for value in (*args, kwargs.get("generation_config")) if isinstance(value, GenerationConfig)]
        settings = {**vars(given[0] if given else self.generation_config), **kwargs}
        if settings.get("assistant_early_exit"):
            raise NotImplementedError("assistant_early_exit leaves out the blocks that judge. Run without it.")
        if settings.get("assistant_ensemble_weight") is not None:
            raise NotImplementedError(
                "assistant_ensemble_weight mixes the words of an unguarded model into the answer. Run without it."
            )
        if settings.get("guidance_scale") not in (None, 1, 1.0):
            raise NotImplementedError(
                "guidance_scale mixes in the answer to a second, negative prompt, which may be refused apart from the "
                "first. Run without it."
            )
        if self.training and self.is_gradient_checkpointing and settings.get("use_cache") is not False:
            raise NotImplementedError("gradient checkpointing keeps no cache to generate with. Call eval() first.")
        if settings.get("is_assistant"):
            raise NotImplementedError(
                "a guarded model does not guard the model that it drafts for. Take the guarded model as the main one, "
                "and an unguarded one as the assistant."
            )
        if "paged" in str(settings.get("cache_implementation")):
            raise NotImplementedError(f"cache_implementation='paged': {PACKED}")
        return super().generate(*args, **kwargs)

    @classmethod
    def is_backend_compatible(cls) -> bool:
        """Serving engines that run the decoder under a head of their own ask this: they would lose the gate."""
        return False

    def _no_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"continuous batching: {PACKED}")

    generate_batch = init_continuous_batching = continuous_batching_context_manager = _no_continuous_batching

    def _sample(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with generating(input_ids, kwargs):
            return super()._sample(input_ids, *args, **kwargs)

    def _beam_search(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with generating(input_ids, kwargs):
            return super()._beam_search(input_ids, *args, **kwargs)

    def _assisted_decoding(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with generating(input_ids, kwargs):
            return super()._assisted_decoding(input_ids, *args, **kwargs)


def _sealed(init: Callable) -> Callable:
    """The stock class's `__init__`, which refuses a guarded configuration that it is handed already opened."""

    @functools.wraps(init)
    def sealed_init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if hasattr(config, "sasa") and not hasattr(type(self), "_sasa_forward"):
            raise ValueError(SEAL)
        init(self, config, *args, **kwargs)

    sealed_init.sealed_by_sasa = True
    return sealed_init


def _guarded(forward: Callable) -> Callable:
    """The family's forward with the gate around it; generate() still reads the family's own signature."""
    names = list(inspect.signature(forward).parameters)[1:]

    @functools.wraps(forward)
    def guarded_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._sasa_forward(forward, dict(zip(names, args, strict=False), **kwargs))

    return guarded_forward
