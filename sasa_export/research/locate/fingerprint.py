"""What finished work depends on: the model's files, the prompts to the pixel, and how the model runs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from sasa_export.models import Source
from sasa_export.prompts.prompt import Prompt


def fingerprint(source: Source, prompts: Sequence[Prompt], **running: Any) -> dict[str, Any]:
    """A JSON object: equal objects mean that finished results may be used again."""
    return {
        "model": _of_model(source),
        "prompts": _of_prompts(prompts),
        "versions": {name: version(name) for name in ("sasa-export", "torch", "transformers", "numpy", "pillow")},
        **running,
    }


def _of_model(source: Source) -> str:
    """The configuration, and the head of every shard with its size and time: shards are too large to be read whole."""
    found = hashlib.sha256((source.directory / "config.json").read_bytes())
    for shard in source.shards:
        state = shard.path.stat()
        found.update(f"{shard.path.name} {state.st_size} {state.st_mtime_ns}\n".encode())
        with shard.path.open("rb") as file:
            found.update(file.read(1 << 20))
    return found.hexdigest()


def _of_prompts(prompts: Sequence[Prompt]) -> str:
    found = hashlib.sha256()
    for prompt in prompts:
        found.update(repr((prompt.name, prompt.prompt, prompt.label, prompt.group, prompt.channel)).encode())
        if prompt.image is not None:
            picture = prompt.image()
            found.update(repr(picture.size).encode() + picture.tobytes())
    return found.hexdigest()
