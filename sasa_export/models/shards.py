"""The safetensors files of a model directory, checked by their headers alone."""

from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open

from sasa_export.errors import OpenError, reworded
from sasa_export.models.contents import read_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth")


@dataclass(frozen=True)
class Shard:
    """One safetensors file, with the names, shapes and types of its tensors in the same order."""

    path: Path
    keys: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...] = field(repr=False)
    types: tuple[str, ...] = field(repr=False)


def read_shards(directory: Path) -> tuple[Shard, ...]:
    """Return all shards in order. Raise OpenError where a file is missing, corrupt, outside, or a pickle."""
    if (directory / SINGLE).exists():
        return (_shard(directory / SINGLE),)
    if not (directory / INDEX).exists():
        pickled = [path.name for path in sorted(directory.iterdir()) if path.suffix in PICKLES]
        raise OpenError(
            f"{directory} should hold its weights as {SINGLE} or {INDEX} and has "
            f"{f'only {pickled[0]}, a pickle' if pickled else 'none'}. "
            "Only safetensors is read: convert the model with save_pretrained first."
        )
    listed = _weight_map(directory / INDEX)
    shards = tuple(_shard(directory / name) for name in sorted(set(listed.values())))
    held = {key: shard.path.name for shard in shards for key in shard.keys}
    for key, name in listed.items():
        if held.get(key) != name:
            raise OpenError(
                f"{INDEX} says that {key} is in {name}, and it is not. Restore the files from their source."
            )
    return shards


def _weight_map(path: Path) -> dict[str, str]:
    """Return the file name of each tensor, as the index lists it."""
    listed = read_object(path).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise OpenError(f"{path} is not a valid index of shards. Restore the file from its source.")
    for name in listed.values():
        if Path(name).name != name:
            raise OpenError(f"{path} names {name!r}, which lies outside the model's directory. The index is not safe.")
    return listed


def _shard(path: Path) -> Shard:
    if not path.exists():
        raise OpenError(f"the shard {path} is missing. Restore the file from its source.")
    corrupt = f"the shard {path} is corrupt ({{reason}}). Restore the file from its source."
    # safe_open reads the header alone, and checks it against the file's length.
    with reworded(OpenError, corrupt), safe_open(path, framework="np") as file:
        keys = tuple(file.keys())
        slices = [file.get_slice(key) for key in keys]
        shapes, types = (tuple(part.get_shape()) for part in slices), (part.get_dtype() for part in slices)
        return Shard(path, keys, tuple(shapes), tuple(types))
