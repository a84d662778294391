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
class OnnxRecipe:
    """How some of a family's model types are exported as ONNX graphs.

    `tower` names the class of vision_encoder.onnx in sasa_export/onnx/towers/, `vision_types` the types of vision tower
    that it supports (empty: any). `position_axes` is 3 for M-RoPE. A runtime may leave out `optional_inputs` of the
    vision graph and the further `decoder_inputs`, which are then zero. `renamed_inputs`: the tower's names -> the
    graph's. `transformers_js` says how far the family was run there (empty: it has no class for it), `picture_first`
    the order of its processor's arguments, and `flat_config` that it reads the decoder's sizes at the top of
    config.json.
    """

    model_types: tuple[str, ...]
    tower: str
    vision_types: tuple[str, ...] = ()
    position_axes: int = 1
    optional_inputs: tuple[str, ...] = ()
    decoder_inputs: tuple[str, ...] = ()
    renamed_inputs: dict[str, str] = field(default_factory=dict)
    transformers_js: str = ""
    picture_first: bool = False
    flat_config: bool = False

    def __post_init__(self) -> None:
        if self.position_axes not in (1, 3) or self.tower.count(".") != 1:
            raise ValueError("onnx needs position_axes 1 or 3, and as tower a module and a class, with a dot between")


@dataclass(frozen=True)
class Family:
    """A family of models, as its file under graphs/ describes it.

    `modules` holds the module paths by role; `peculiar` notes what the second lane must respect; `files` are glob
    patterns of the files beside the weights that a patched directory needs. `vllm` and `mlx` are the model types that
    sasa-vllm serves and that mlx-vlm was tried on; `needs` says what code of the package a type needs.
    `scaled_logits`: the model multiplies the head's logits by a number. A family that cannot be guarded has only
    `model_types` and `refused`, the reason.
    """

    name: str
    model_types: tuple[str, ...]
    files: tuple[str, ...] = ()
    modules: dict[str, str] = field(default_factory=dict)
    layers: tuple[KnownLayers, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)
    peculiar: dict[str, str] = field(default_factory=dict)
    scaled_logits: bool = False
    vllm: tuple[str, ...] = ()
    mlx: tuple[str, ...] = ()
    onnx: OnnxRecipe | None = None
    needs: dict[str, str] = field(default_factory=dict)
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
        data["layers"] = tuple(KnownLayers(**entry) for entry in data.get("layers", ()))
        data["onnx"] = OnnxRecipe(**_frozen(data["onnx"])) if "onnx" in data else None
        family = Family(path.stem, **{"files": data["files"], **_frozen(data)})
        others = {*family.vllm, *family.mlx, *family.needs, *(family.onnx.model_types if family.onnx else ())}
        if others - set(family.model_types):
            raise ValueError(f"{', '.join(others - set(family.model_types))} is not among model_types")
        for role in MODULES:
            if not isinstance(family.modules[role], str):
                raise ValueError(f"modules.{role} is no module path")
        if not all(isinstance(target, str) for target in family.aliases.values()):
            raise ValueError("an alias is not a string (an alias with a dot needs quotes)")
        return family
    except KeyError as error:
        fault = f"{error.args[0]} is missing"
    except (ValueError, TypeError) as error:
        fault = str(error)
    raise SasaExportError(f"{path.name}: {fault}. graphs/README.md says what belongs there.")


def _frozen(table: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in table.items()}


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


def onnx_recipes() -> dict[str, OnnxRecipe]:
    """Return the recipe of every model type that has one."""
    recipes = (family.onnx for family in families().values() if family.onnx)
    return {name: recipe for recipe in recipes for name in recipe.model_types}


def aliases() -> dict[str, str]:
    """Return the hub id of every alias."""
    return {alias: target for family in families().values() for alias, target in family.aliases.items()}
