"""The safetensors files of a model directory, checked by their headers alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from sasa_export.errors import OpenError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Shard:
    """One safetensors file, the names of the tensors in it, and their shapes in the same order."""

    path: Path
    keys: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...] = field(repr=False)


def read_shards(directory: Path) -> tuple[Shard, ...]:
    """All shards in order. Raises OpenError where a file is missing, corrupt, outside, or a pickle."""
    if (directory / SINGLE).exists():
        names = [SINGLE]
        listed: dict[str, str] = {}
    elif (directory / INDEX).exists():
        listed = _weight_map(directory / INDEX)
        names = sorted(set(listed.values()))
    else:
        pickled = next(
            (path for ending in ("bin", "pt", "pth") for path in sorted(directory.glob(f"*.{ending}"))), None
        )
        what = f"only {pickled.name}, a pickle" if pickled else "none"
        raise OpenError(
            f"{directory} should hold its weights as {SINGLE} or {INDEX} and has {what}. "
            "Only safetensors is read: convert the model with save_pretrained first."
        )
    shards = [_shard(directory, name) for name in names]
    held: dict[str, str] = {}
    for shard in shards:
        for key in shard.keys:
            if key in held:
                raise OpenError(
                    f"{key} is in {held[key]} and in {shard.path.name}. Restore the files from their source."
                )
            held[key] = shard.path.name
    for key, name in listed.items():
        if held.get(key) != name:
            raise OpenError(
                f"{INDEX} says that {key} is in {name}, and it is not. Restore the files from their source."
            )
    return tuple(shards)


def _weight_map(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(key): str(name) for key, name in weight_map.items()}
    except (OSError, ValueError, RecursionError, KeyError, AttributeError, TypeError):
        raise OpenError(f"{path} is not a valid index of shards. Restore the file from its source.") from None


def _shard(directory: Path, name: str) -> Shard:
    from safetensors import SafetensorError, safe_open

    if Path(name).name != name or name in ("", "..") or "\0" in name:
        raise OpenError(f"{INDEX} names {name!r}, which lies outside the model's directory. The index is not safe.")
    if not name.endswith(SUFFIX):
        raise OpenError(
            f"{INDEX} names {name!r}, and only safetensors is read. Convert the model with save_pretrained."
        )
    path = directory / name
    try:
        with safe_open(path, framework="np") as file:  # reads the header, and checks it against the file's length
            keys = tuple(file.keys())
            return Shard(path, keys, tuple(tuple(file.get_slice(key).get_shape()) for key in keys))
    except FileNotFoundError:
        raise OpenError(f"the shard {path} is missing. Restore the file from its source.") from None
    except (SafetensorError, OSError) as error:
        raise OpenError(f"the shard {path} is corrupt ({error}). Restore the file from its source.") from None
