"""Quantized checkpoints: whether their quantization scheme runs here."""

from typing import Any

from sasa_export.errors import OpenError, reworded
from sasa_export.models import Source
from sasa_export.models.load import RESTORE, stock_config


def scheme(config: dict[str, Any]) -> str | None:
    """Return the quantization scheme that config.json names. None where the weights are plain."""
    places = [place for place in (config, config.get("text_config")) if isinstance(place, dict)]
    found = next(filter(None, (place.get("quantization_config") for place in places)), None)
    named = isinstance(found, dict) and found.get("quant_method")
    return None if found is None else str(named or "a scheme without a name")


def check_scheme(source: Source, *, plain: bool = False) -> None:
    """Raise OpenError where config.json names a scheme that does not run here, or any scheme if `plain` is set."""
    name = scheme(source.config)
    if name is None:
        return
    if plain:
        raise OpenError(
            f"{source.name} is quantized by {name}, and ONNX graphs are made of plain weights. Give the model that it "
            "was quantized from (--onnx-dtype int8 or int4 makes graphs as small), or --format safetensors."
        )
    does_not_run = (
        f"{source.name} is quantized by {name}, which does not run here ({{reason}}). Install what it asks for "
        "(docs/results/quantized.md lists what was tried), or give the model that it was quantized from."
    )
    with reworded(OpenError, does_not_run):
        from transformers.quantizers.auto import get_hf_quantizer

        config = stock_config(source)
        if get_hf_quantizer(config, None, {"": "cpu"}, weights_only=True, user_agent={})[0] is None:
            raise ValueError("transformers has no loader of this name")  # and would load the numbers unscaled


def check_scales(source: Source) -> None:
    """Raise OpenError where an 8-bit weight lacks its scales: it would be loaded unscaled."""
    held = {key: kind for shard in source.shards for key, kind in zip(shard.keys, shard.types, strict=True)}
    for key, kind in held.items():
        alone = not {f"{key}_scale", f"{key}_scale_inv"} & held.keys()
        if kind.startswith("F8_") and key.endswith(".weight") and alone:
            raise OpenError(f"{key} in the shards of {source.name} is {kind}, and its scales are not there. {RESTORE}")
