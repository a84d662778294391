"""Open a source model: an alias, a hub id or a local directory, as one frozen value."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sasa_export.errors import OpenError
from sasa_export.models.contents import check_contents, read_object
from sasa_export.models.family import Family, KnownLayers, aliases, family_of
from sasa_export.models.shards import Shard, read_shards

EMBEDDED = "smol-llava"


@dataclass(frozen=True)
class Source:
    """An unpatched model as a plain directory; nothing of it is loaded yet.

    `name` is what the user called it, `config` its config.json, `shards` its safetensors files.
    """

    name: str
    directory: Path
    config: dict[str, Any]
    family: Family
    shards: tuple[Shard, ...]

    def weight_bytes(self) -> int:
        return sum(shard.path.stat().st_size for shard in self.shards)


def open_source(name: str, *, cache: Path | None = None) -> Source:
    """Find the model, fetching it where it is not on this machine, and check what can be checked unloaded.

    Raises OpenError: unknown model, unsupported family, corrupt or missing files, pickled weights.
    """
    directory = locate(name, cache=cache)
    config = read_config(directory)
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type.startswith("sasa_"):
        raise OpenError(f"{name} is a patched model already. Give the model that it was made from.")
    family = family_of(model_type)
    check_contents(directory, config)
    return Source(name, directory, config, family, read_shards(directory))


def locate(name: str, *, cache: Path | None = None) -> Path:
    """The model's directory on this machine."""
    if name == EMBEDDED:
        return _embedded(cache)
    known = aliases()
    if name in known:
        return _from_hub(known[name])
    path = Path(name)
    try:
        if path.is_dir():
            return path
    except OSError:  # a name that no directory can have
        pass
    if "/" in name and not name.startswith((".", "/", "~")) and name.count("/") == 1:
        return _from_hub(name)
    raise OpenError(
        f"there is no model {name!r}: it is no directory, no hub id (owner/name) and no alias. "
        f"Aliases: {', '.join(sorted([EMBEDDED, *known]))}."
    )


def read_config(directory: Path) -> dict[str, Any]:
    """config.json. OpenError where it is missing or no JSON object."""
    path = directory / "config.json"
    try:
        if not path.exists():
            raise OpenError(f"{directory} has no config.json, so it is not a model directory. Check the path.")
    except OSError as error:
        raise OpenError(f"{directory} cannot be read ({error.strerror}). Check the path.") from None
    return read_object(path)


def layers_of(
    source: Source, blocks: int, hidden: int, safety: int | None, semantic: int | None
) -> tuple[int, int, str]:
    """Safety layer, semantic layer, and where the numbers come from: the user, the family's file, or a scale."""
    if safety is not None and semantic is not None:
        return safety, semantic, "given by the user"
    known: KnownLayers | None = source.family.known_layers(blocks, hidden)
    if known is not None:
        default = (known.safety, known.semantic, f"{known.checkpoint}: {known.source}")
    else:
        # LLaVA-1.5-7B's 13 and 15 of 32, by depth. A guess, and said to be one wherever it appears.
        first = max(0, round(13 / 32 * blocks))
        default = (
            first,
            max(first + 1, round(15 / 32 * blocks)),
            "scaled by depth from LLaVA-1.5-7B, not measured",
        )
    if safety is None and semantic is None:
        return default
    return (
        default[0] if safety is None else safety,
        default[1] if semantic is None else semantic,
        f"one given by the user, the other {default[2]}",
    )


def _embedded(cache: Path | None) -> Path:
    from sasa_export.files import claimed
    from sasa_export.models import smol_llava

    parts = (smol_llava.VISION, Path(smol_llava.__file__))
    version = hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()[:12]
    folder = (cache or smol_llava.cache_directory()) / f"smol-llava-{version}"
    if not (folder / "config.json").exists():
        with claimed(folder, wait=True):  # two runs at once build it once
            if not (folder / "config.json").exists():
                smol_llava.build(folder, cache)
    return folder


def _from_hub(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.md", "LICENSE*"]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise OpenError(
            f"{repository} could not be fetched from the hub ({reason}). Check the name, the connection and "
            "your access token, or give a local directory."
        ) from None
