"""Open a source model (an alias, a hub id or a local directory) as one frozen value."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sasa_export.errors import OpenError
from sasa_export.files import claimed
from sasa_export.models.contents import check_contents, read_object
from sasa_export.models.family import Family, aliases, family_of
from sasa_export.models.hub import fetch
from sasa_export.models.shards import Shard, read_shards
from sasa_export.models.wheels import cache_directory

EMBEDDED = "smol-llava"


@dataclass(frozen=True)
class Source:
    """An unpatched model in a local directory. Its weights are not loaded.

    `name` is the name that the user gave, `config` the content of config.json, `shards` the safetensors files. Only a
    model from the hub has `repository` and `commit`.
    """

    name: str
    directory: Path
    config: dict[str, Any]
    family: Family
    shards: tuple[Shard, ...]
    repository: str | None = None
    commit: str | None = None

    def weight_bytes(self) -> int:
        """Return the size of all shards on disk, in bytes."""
        return sum(shard.path.stat().st_size for shard in self.shards)


def open_source(
    name: str,
    revision: str | None = None,
    check: Callable[[Source], None] = lambda source: None,
) -> Source:
    """Find a model, fetch it from the hub if necessary, and check it without loading its weights.

    Args:
        revision: a branch, tag or commit on the hub.
        check: a further check of config.json, which runs before any weights are fetched or read.

    Raises OpenError for an unknown model, an unsupported family, bad or missing files, pickles or custom code.
    """
    repository = _repository(name)
    if revision is not None and repository is None:
        raise OpenError(f"--revision {revision} is of a model on the hub, and {name} is none. Leave it out.")
    described = partial(_described, name, repository)
    if repository is not None:
        directory = fetch(repository, revision, lambda directory: check(described(directory)))
    else:
        directory = _embedded() if name == EMBEDDED else Path(name)
        check(described(directory))
    check_contents(directory)
    return replace(described(directory), shards=read_shards(directory))


def _described(name: str, repository: str | None, directory: Path) -> Source:
    """Return the source as its config.json describes it, without shards."""
    config = read_config(directory)
    model_type = config.get("model_type")
    if str(model_type).startswith("sasa_"):
        raise OpenError(f"{name} is a patched model already. Give the model that it was made from.")
    commit = None if repository is None else directory.name  # the hub's cache names snapshots by commit
    return Source(name, directory, config, family_of(model_type), (), repository, commit)


def read_config(directory: Path) -> dict[str, Any]:
    """Return the content of config.json. Raise OpenError where it is missing or no JSON object."""
    path = directory / "config.json"
    if not path.exists():
        raise OpenError(f"{directory} has no config.json, so it is not a model directory. Check the path.")
    return read_object(path)


def layers_of(
    source: Source, blocks: int, hidden: int, safety: int | None, semantic: int | None
) -> tuple[int, int, str]:
    """Return safety layer, semantic layer, and their origin: the user, the family's file, or a scale by depth.

    Args:
        blocks: the decoder's number of blocks; `hidden`: the width of its hidden state.
        safety: zero-based block given by the user, or None; `semantic` likewise.
    """
    known = source.family.known_layers(blocks, hidden)
    if known is not None:
        first, second, origin = known.safety, known.semantic, f"{known.checkpoint}: {known.source}"
    else:
        # A guess: blocks 13 and 15 of LLaVA-1.5-7B's 32, scaled by depth. The origin says that it is not measured.
        first = round(13 / 32 * blocks)
        second = max(first + 1, round(15 / 32 * blocks))
        origin = "scaled by depth from LLaVA-1.5-7B, not measured"
    if safety is not None and semantic is not None:
        origin = "given by the user"
    elif safety is not None or semantic is not None:
        origin = f"one given by the user, the other {origin}"
    return first if safety is None else safety, second if semantic is None else semantic, origin


def _repository(name: str) -> str | None:
    """Return the hub id that a name stands for. None for the embedded model and for a directory."""
    known = aliases()
    if name == EMBEDDED or Path(name).is_dir():  # a directory comes before an alias of its name
        return None
    if name in known or (name.count("/") == 1 and not name.startswith((".", "/", "~"))):
        return known.get(name, name)
    raise OpenError(
        f"there is no model {name!r}: it is no directory, no hub id (owner/name) and no alias. "
        f"Aliases: {', '.join(sorted([EMBEDDED, *known]))}."
    )


def _embedded() -> Path:
    """Return the directory of smol-llava, which is built again only when one of its source files changes."""
    from sasa_export.models import smol_llava

    parts = (smol_llava.VISION, Path(smol_llava.__file__), *sorted(smol_llava.FILES.iterdir()))
    version = hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()[:12]
    folder = cache_directory() / f"smol-llava-{version}"
    if not folder.exists():  # a cache that is complete need not be writable
        with claimed(folder, wait=True):  # another run may be building it
            if not folder.exists():
                smol_llava.build(folder)
    return folder
