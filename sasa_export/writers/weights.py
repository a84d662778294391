"""Writes the shards. They are copied or linked, never loaded. The probe gets a shard of its own."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from sasa_export.errors import EmitError
from sasa_export.models.shards import INDEX, SINGLE, Shard
from sasa_export.probe.file import PROBE_BIAS, PROBE_WEIGHT
from sasa_export.probe.fit import Probe

CHUNK = 1 << 22  # bytes


def write_weights(
    shards: tuple[Shard, ...], probe: Probe, directory: Path, *, link: bool, advance: Callable[[int], None]
) -> dict[str, str | None]:
    """Write all shards and their index. Return the SHA-256 of each shard by name, None for a linked shard."""
    digests: dict[str, str | None] = {}
    weight_map: dict[str, str] = {}
    single = [shard.path.name for shard in shards] == [SINGLE]
    for shard in shards:
        # Loaders take a lone model.safetensors without reading the index, and would miss the probe.
        name = "model-00001-of-00002.safetensors" if single else shard.path.name
        digests[name] = bring(shard.path, directory / name, link=link, advance=advance)
        weight_map.update(dict.fromkeys(shard.keys, name))
    name = "model-00002-of-00002.safetensors" if single else "sasa-probe.safetensors"
    if name in digests:
        raise EmitError(f"the source has a shard of its own called {name}. Rename it, there and in {INDEX}.")
    save_probe(probe, directory / name)
    weight_map.update({PROBE_WEIGHT: name, PROBE_BIAS: name})
    total = sum((directory / name).stat().st_size for name in sorted(set(weight_map.values())))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return digests


def save_probe(probe: Probe, path: Path) -> None:
    """Write `sasa.probe.weight` (features,) and `sasa.probe.bias` (), float32, in the format that --probe reads."""
    tensors = {
        PROBE_WEIGHT: np.asarray(probe.weight, np.float32),
        PROBE_BIAS: np.asarray(probe.bias, np.float32).reshape(()),
    }
    path.write_bytes(save(tensors, metadata={"format": "pt"}))


def bring(source: Path, target: Path, *, link: bool, advance: Callable[[int], None]) -> str | None:
    """Link or copy one file. Return the SHA-256 of a copy, which is read once, or None for a link."""
    digest = hashlib.sha256()
    source = source.resolve()  # a hub cache holds links to blobs
    if link:
        with contextlib.suppress(OSError):  # another disk, or a file system without links
            os.link(source, target)
            advance(target.stat().st_size)
            return None
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(CHUNK):
            digest.update(chunk)
            writer.write(chunk)
            advance(len(chunk))
    return digest.hexdigest()
