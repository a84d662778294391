"""Model families, read from graphs/*.toml: one declarative file each, checked when it is read."""

import functools
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sasa_export.errors import OpenError, SasaExportError

MODULES = ("embedding", "blocks", "norm", "head", "vision", "projector")


@dataclass(frozen=True)
class KnownLayers:
    """Safety and semantic layer (zero-based) of decoders of one shape, and where the numbers come from."""

    checkpoint: str
    blocks: int
    hidden: int
    safety: int
    semantic: int
    source: str

    def __post_init__(self) -> None:
        if not 0 <= self.safety < self.semantic < self.blocks or not self.source:
            raise ValueError(f"layers of {self.checkpoint} need 0 <= safety < semantic < blocks and a source")


@dataclass(frozen=True)
class Family:
    """What a file under graphs/ says of a family of models.

    `modules` holds the module paths by role; `peculiar` what the second lane has to respect; `files` the
    files beside the weights that travel into a patched directory, as glob patterns. `scaled_logits`: behind the head,
    logits are multiplied by a number. `refused` says why a family cannot be guarded, and is all there is of one.
    """

    name: str
    model_types: tuple[str, ...]
    files: tuple[str, ...] = ()
    modules: dict[str, str] = field(default_factory=dict)
    layers: tuple[KnownLayers, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)
    peculiar: dict[str, str] = field(default_factory=dict)
    scaled_logits: bool = False
    refused: str = ""

    def known_layers(self, blocks: int, hidden: int) -> KnownLayers | None:
        """The entry for decoders of this shape."""
        return next((entry for entry in self.layers if (entry.blocks, entry.hidden) == (blocks, hidden)), None)


def directory() -> Path:
    """graphs/, inside the installed package or at the root of the repository."""
    inside = Path(__file__).parents[1] / "graphs"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "graphs"


@functools.cache
def families() -> dict[str, Family]:
    """All families by name."""
    return {path.stem: read(path) for path in sorted(directory().glob("*.toml"))}


def read(path: Path) -> Family:
    """Read one family file; SasaExportError names what is wrong in it."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        if "refused" in data:
            return Family(path.stem, tuple(data["model_types"]), refused=str(data["refused"]))
        for name in ("model_types", "files"):
            data[name] = tuple(data[name])
        data["layers"] = tuple(KnownLayers(**entry) for entry in data.get("layers", ()))
        family = Family(path.stem, **data)
        for role in MODULES:
            if not isinstance(family.modules[role], str):
                raise ValueError(f"modules.{role} is no module path")
        if not isinstance(family.scaled_logits, bool):
            raise ValueError("scaled_logits is neither true nor false")
        if not all(isinstance(target, str) for target in family.aliases.values()):
            raise ValueError("an alias is not a string (an alias with a dot needs quotes)")
        return family
    except KeyError as error:
        fault = f"{error.args[0]} is missing"
    except (ValueError, TypeError) as error:
        fault = str(error)
    raise SasaExportError(f"{path.name}: {fault}. graphs/README.md says what belongs there.")


def family_of(model_type: Any) -> Family:
    """The family that a config.json's model_type belongs to; OpenError lists the supported ones, or says why not."""
    for family in families().values():
        if model_type in family.model_types and not family.refused:
            return family
        if model_type in family.model_types:
            raise OpenError(f"model type {model_type!r} cannot be guarded: {family.refused}. Use another model.")
    usable = [family for family in families().values() if not family.refused]
    supported = ", ".join(sorted(name for family in usable for name in family.model_types))
    raise OpenError(
        f"model type {model_type!r} is not supported. Supported: {supported}. "
        "To add a family, write one file under graphs/ (graphs/README.md says how)."
    )


def aliases() -> dict[str, str]:
    """Every alias, and the hub id that it stands for."""
    return {alias: target for family in families().values() for alias, target in family.aliases.items()}
