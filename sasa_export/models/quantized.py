"""Checkpoints that somebody quantized, and what any checkpoint holds: seen by its loader without loading."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager, redirect_stderr
from typing import Any

from sasa_export.errors import OpenError, reworded
from sasa_export.models import Source
from sasa_export.models.load import RESTORE, check_loaded, explained, stock_classes, stock_config


def scheme(config: dict[str, Any]) -> str | None:
    """The scheme that config.json says the weights are quantized by; None where they are plain."""
    places = [place for place in (config, config.get("text_config")) if isinstance(place, dict)]
    found = next(filter(None, (place.get("quantization_config") for place in places)), None)
    named = isinstance(found, dict) and found.get("quant_method")
    return None if found is None else str(named or "a scheme without a name")


def check_scheme(source: Source, *, plain: bool = False) -> None:
    """Raise OpenError where a scheme does not run here, as far as config.json tells, or weights have to be `plain`."""
    name = scheme(source.config)
    if name is None:
        return
    if plain:
        raise OpenError(
            f"{source.name} is quantized by {name}, and ONNX graphs are made of plain weights. Give the model that it "
            "was quantized from (--onnx-dtype int8 or int4 makes graphs as small), or --format safetensors."
        )
    with _runs_here(source, name):
        from transformers.quantizers.auto import get_hf_quantizer

        config = stock_config(source)
        if get_hf_quantizer(config, None, {"": "cpu"}, weights_only=True, user_agent={})[0] is None:
            raise ValueError("transformers has no loader of this name")  # it would load the numbers as they are


def load_shapes(source: Source) -> Any:
    """The stock model on the meta device, loaded from the shapes and types of what the shards hold.

    Raises OpenError where a tensor is missing, unexpected or of another shape, or a scheme does not run here.
    """
    import torch
    from transformers.modeling_utils import str_to_torch_dtype

    name, stored = scheme(source.config), dict[str, Any]()
    for shard in source.shards:
        for key, shape, kind in zip(shard.keys, shard.shapes, shard.types, strict=True):
            stored[key] = torch.empty(shape, dtype=str_to_torch_dtype[kind], device="meta")
    for key, tensor in stored.items() if name is not None else ():
        narrow = key.endswith(".weight") and tensor.is_floating_point() and tensor.itemsize == 1
        if narrow and not {f"{key}_scale", f"{key}_scale_inv"} & stored.keys():  # it would be loaded unscaled
            raise OpenError(f"{key} in the shards of {source.name} has 8 bits, and its scales are not there. {RESTORE}")
    what = explained(f"the config.json of {source.name} describes no model")
    _, model_class = stock_classes(source)
    with what if name is None else _runs_here(source, name), redirect_stderr(io.StringIO()):  # of progress bars
        model, info = model_class.from_pretrained(  # type: ignore[attr-defined]
            None, config=stock_config(source), state_dict=stored, device_map={"": "meta"},
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    check_loaded(source, info)
    return model


def _runs_here(source: Source, name: str) -> AbstractContextManager[None]:
    """OpenError for whatever a scheme's own library raises."""
    return reworded(
        OpenError,
        f"{source.name} is quantized by {name}, which does not run here ({{reason}}). Install what it asks for "
        "(docs/quantized.md lists what was tried), or give the model that it was quantized from.",
    )
