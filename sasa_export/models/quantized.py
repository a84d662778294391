"""Checkpoints that somebody quantized: whether their scheme runs here, and what its loader wants them to hold."""

from __future__ import annotations

import copy
import io
from contextlib import AbstractContextManager, redirect_stderr
from typing import Any

from sasa_export.errors import OpenError, reworded
from sasa_export.models import Source
from sasa_export.models.load import stock_config


def scheme(config: dict[str, Any]) -> str | None:
    """The scheme that config.json says the weights are quantized by; None where they are plain."""
    places = [place for place in (config, config.get("text_config")) if isinstance(place, dict)]
    found = next(filter(None, (place.get("quantization_config") for place in places)), None)
    named = isinstance(found, dict) and found.get("quant_method")
    return None if found is None else str(named or "a scheme without a name")


def check_scheme(source: Source, *, plain: bool = False) -> None:
    """Raise OpenError where a scheme does not run here, as far as config.json tells, or weights have to be `plain`."""
    name = scheme(source.config)
    if name is not None and plain:
        raise OpenError(
            f"{source.name} is quantized by {name}, and ONNX graphs are made of plain weights. Give the model that it "
            "was quantized from (--onnx-dtype int8 or int4 makes graphs as small), or --format safetensors."
        )
    if name is not None:
        with _runs_here(source, name):
            _loader(stock_config(source))


def as_stored(source: Source, model: Any) -> tuple[Any, Any]:
    """A skeleton with the tensors that the shards hold, and the scheme's loader; as it is, and None, where plain.

    Raises OpenError where the scheme does not run here.
    """
    import torch

    name = scheme(source.config)
    if name is None:
        return model, None
    model = copy.deepcopy(model)
    shards = [str(shard.path) for shard in source.shards]
    with _runs_here(source, name), torch.device("meta"), redirect_stderr(io.StringIO()):  # of progress bars
        loader, places = _loader(model.config)
        loader.preprocess_model(model, model.dtype, device_map=places, checkpoint_files=shards, use_kernels=False)
    return model, loader


def _loader(config: Any) -> tuple[Any, Any]:
    """The scheme's loader, and where it puts the weights."""
    from transformers.quantizers.auto import get_hf_quantizer

    loader, _, places = get_hf_quantizer(config, None, {"": "cpu"}, weights_only=True, user_agent={})
    if loader is None:  # transformers would load the numbers as they are
        raise ValueError("transformers has no loader of this name")
    return loader, places


def _runs_here(source: Source, name: str) -> AbstractContextManager[None]:
    """OpenError for whatever a scheme's own library raises."""
    return reworded(
        OpenError,
        f"{source.name} is quantized by {name}, which does not run here ({{reason}}). Install what it asks for "
        "(docs/quantized.md lists what was tried), or give the model that it was quantized from.",
    )
