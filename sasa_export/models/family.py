"""Model families, read from graphs/*.toml: one declarative file per family, checked when it is read."""

import functools
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sasa_export.errors import OpenError, SasaExportError

MODULES = ("embedding", "blocks", "norm", "head", "vision", "projector")


@dataclass(frozen=True)
class KnownLayers:
    """Safety and semantic layer (zero-based) for decoders of one shape, and the source of these numbers."""

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
    """A family of models, as its file under graphs/ describes it.

    `modules` holds the module paths by role; `peculiar` notes what the second lane must respect; `files` are glob
    patterns of the files beside the weights that a patched directory needs. `scaled_logits`: the model multiplies
    the head's logits by a number. A family that cannot be guarded has only `model_types` and `refused`, the reason.
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
        """Return the entry for decoders of this shape, or None."""
        return next((entry for entry in self.layers if (entry.blocks, entry.hidden) == (blocks, hidden)), None)


def directory() -> Path:
    """Return the graphs/ directory, inside the installed package or at the root of the repository."""
    inside = Path(__file__).parents[1] / "graphs"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "graphs"


@functools.cache
def families() -> dict[str, Family]:
    """Return all families by name."""
    return {path.stem: read(path) for path in sorted(directory().glob("*.toml"))}


def read(path: Path) -> Family:
    """Read the file of one family. Raise SasaExportError, which names the fault, where it is invalid."""
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
    """Return the family of a model_type. OpenError lists the supported types, or says why a type is refused."""
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
    """Return the hub id of every alias."""
    return {alias: target for family in families().values() for alias, target in family.aliases.items()}
