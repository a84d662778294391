"""The safetensors files of a model directory, checked by their headers alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sasa_export.errors import OpenError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Shard:
    """One safetensors file and the names of the tensors in it."""

    path: Path
    keys: tuple[str, ...]


def read_shards(directory: Path) -> tuple[Shard, ...]:
    """All shards in order. Raises OpenError where a file is missing, corrupt, outside, or a pickle."""
    if (directory / SINGLE).exists():
        names = [SINGLE]
        listed: dict[str, str] = {}
    elif (directory / INDEX).exists():
        listed = _weight_map(directory / INDEX)
        names = sorted(set(listed.values()))
    else:
        pickled = next(iter(sorted(directory.glob("*.bin"))), None)
        what = f"only {pickled.name}, a pickle" if pickled else "none"
        raise OpenError(
            f"{directory} should hold its weights as {SINGLE} or {INDEX} and has {what}. "
            "Only safetensors is read: convert the model with save_pretrained first."
        )
    shards = []
    for name in names:
        if Path(name).name != name:
            raise OpenError(f"{INDEX} names {name!r}, which lies outside the model's directory. The index is not safe.")
        shards.append(Shard(directory / name, _keys(directory / name)))
    held = {key: shard.path.name for shard in shards for key in shard.keys}
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
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError):
        raise OpenError(f"{path} is not a valid index of shards. Restore the file from its source.") from None


def _keys(path: Path) -> tuple[str, ...]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:  # reads the header, and checks it against the file's length
            return tuple(file.keys())
    except FileNotFoundError:
        raise OpenError(f"the shard {path} is missing. Restore the file from its source.") from None
    except (SafetensorError, OSError) as error:
        raise OpenError(f"the shard {path} is corrupt ({error}). Restore the file from its source.") from None
