"""Whether the shards hold the tensors that a model needs, seen without loading them."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from sasa_export.errors import OpenError
from sasa_export.models import Source

RESTORE = "The files do not belong together: restore them from their source."
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls what needs no scale

Shape = tuple[int, ...]


def check_tensors(source: Source, model: Any, loader: Any = None) -> None:
    """Raise OpenError where the shards lack a tensor that the model needs, or have it in another shape.

    Args: loader: of the scheme that the weights are quantized by.
    """
    held = _held(source, model, loader)
    tied = model.all_tied_weights_keys
    wanted = dict(model.named_parameters())
    missing = sorted(name for name in wanted if name not in held and tied.get(name, name) not in held)
    if missing:
        raise OpenError(
            f"the shards of {source.name} lack {len(missing)} tensors of the model ({missing[0]}). "
            "Restore the files from their source."
        )
    for name, tensor in wanted.items():
        found = held.get(name)
        if found is not None and found != tuple(tensor.shape):
            raise OpenError(
                f"{name} in the shards of {source.name} has shape {found}, and its config.json says "
                f"{tuple(tensor.shape)}. {RESTORE}"
            )


def _held(source: Source, model: Any, loader: Any) -> dict[str, Shape | None]:
    """The shape of every tensor in the shards, by its name in the model, mapped as on loading.

    None for what a mapping merges or splits: its shape changes on the way.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    transforms = get_model_conversion_mapping(model, None, loader)
    held: dict[str, Shape | None] = {}
    parts: dict[str, list[tuple[str, Shape]]] = defaultdict(list)  # of quantized weights: types and shapes
    for shard in source.shards:
        for name, shape, kind in zip(shard.keys, shard.shapes, shard.types, strict=True):
            whole, more = True, []
            for transform in transforms:
                name, pattern = transform.rename_source_key(name)
                if pattern is None or isinstance(transform, WeightRenaming):
                    continue
                whole, (first, *others) = False, transform.target_patterns
                more = [name.replace(first, other) for other in others]  # it is named by the first of several
                steps = [getattr(step, "hf_quantizer", None) for step in transform.operations]
                if loader is not None and steps == [loader]:
                    parts[name].append((kind, shape))
            held |= dict.fromkeys([name, *more], shape if whole else None)
    return held | {name: _alone(source, name, *found[0]) for name, found in parts.items() if len(found) == 1}


def _alone(source: Source, name: str, kind: str, shape: Shape) -> Shape:
    """The shape of a weight that came without scales; OpenError where it is of a type that needs them."""
    if kind not in FLOATS:
        raise OpenError(f"{name} in the shards of {source.name} is {kind}, and its scales are not there. {RESTORE}")
    return shape
