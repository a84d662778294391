"""Open a source model: an alias, a hub id or a local directory, as one frozen value."""

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
    """An unpatched model as a plain directory; nothing of it is loaded yet.

    `name` is what the user called it, `config` its config.json, `shards` its safetensors files. `repository` and
    `commit` say where on the hub it is from, if it is.
    """

    name: str
    directory: Path
    config: dict[str, Any]
    family: Family
    shards: tuple[Shard, ...]
    repository: str | None = None
    commit: str | None = None

    def weight_bytes(self) -> int:
        """Bytes of all shards on disk."""
        return sum(shard.path.stat().st_size for shard in self.shards)


def open_source(
    name: str,
    revision: str | None = None,
    check: Callable[[Source], None] = lambda source: None,
) -> Source:
    """Find the model, fetching it where it is not on this machine, and check what can be checked unloaded.

    Args:
        revision: a branch, tag or commit on the hub.
        check: a further check, of what config.json says, before any weights are fetched or looked at.

    Raises OpenError: unknown model, unsupported family, corrupt or missing files, pickled weights, code of its own.
    """
    repository = _repository(name)
    if revision is not None and repository is None:
        raise OpenError(f"--revision {revision} is of a model on the hub, and {name} is none. Leave it out.")
    described = partial(_described, name, repository)
    if repository is not None:
        directory = fetch(repository, revision, lambda directory: check(described(directory)))
        source = described(directory)
    else:
        source = described(_embedded() if name == EMBEDDED else Path(name))
        check(source)
    check_contents(source.directory)
    return replace(source, shards=read_shards(source.directory))


def _described(name: str, repository: str | None, directory: Path) -> Source:
    """The model as its config.json describes it, without its weights."""
    config = read_config(directory)
    model_type = config.get("model_type")
    if str(model_type).startswith("sasa_"):
        raise OpenError(f"{name} is a patched model already. Give the model that it was made from.")
    commit = None if repository is None else directory.name  # as the hub's cache names a snapshot
    return Source(name, directory, config, family_of(model_type), (), repository, commit)


def read_config(directory: Path) -> dict[str, Any]:
    """config.json. OpenError where it is missing or no JSON object."""
    path = directory / "config.json"
    if not path.exists():
        raise OpenError(f"{directory} has no config.json, so it is not a model directory. Check the path.")
    return read_object(path)


def layers_of(
    source: Source, blocks: int, hidden: int, safety: int | None, semantic: int | None
) -> tuple[int, int, str]:
    """Safety layer, semantic layer, and where the numbers come from: the user, the family's file, or a scale.

    Args:
        blocks: how many the decoder has; `hidden`: the width of its hidden state.
        safety: zero-based block given by the user, or None; `semantic` likewise.
    """
    if safety is not None and semantic is not None:
        return safety, semantic, "given by the user"
    known = source.family.known_layers(blocks, hidden)
    if known is not None:
        first, second, origin = known.safety, known.semantic, f"{known.checkpoint}: {known.source}"
    else:
        # LLaVA-1.5-7B's 13 and 15 of 32, by depth. A guess, and said to be one wherever it appears.
        first = round(13 / 32 * blocks)
        second = max(first + 1, round(15 / 32 * blocks))
        origin = "scaled by depth from LLaVA-1.5-7B, not measured"
    if safety is None and semantic is None:
        return first, second, origin
    origin = f"one given by the user, the other {origin}"
    return first if safety is None else safety, second if semantic is None else semantic, origin


def _repository(name: str) -> str | None:
    """The hub id that a name stands for; None for the embedded model and a directory."""
    known = aliases()
    if name in (EMBEDDED, *known) and Path(name).is_dir():
        raise OpenError(
            f"{name} is an alias, and a directory here. Give ./{name} for the directory, or "
            f"{'run the command elsewhere' if name == EMBEDDED else known[name]} for the alias."
        )
    if name == EMBEDDED or Path(name).is_dir():
        return None
    if name in known or (name.count("/") == 1 and not name.startswith((".", "/", "~"))):
        return known.get(name, name)
    raise OpenError(
        f"there is no model {name!r}: it is no directory, no hub id (owner/name) and no alias. "
        f"Aliases: {', '.join(sorted([EMBEDDED, *known]))}."
    )


def _embedded() -> Path:
    """smol-llava, built once for each version of what it is built from."""
    from sasa_export.models import smol_llava

    parts = (smol_llava.VISION, Path(smol_llava.__file__), *sorted(smol_llava.FILES.iterdir()))
    version = hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()[:12]
    folder = cache_directory() / f"smol-llava-{version}"
    if not folder.exists():
        with claimed(folder, wait=True):  # another run may be building it
            if not folder.exists():
                smol_llava.build(folder)
    return folder
