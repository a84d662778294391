"""A patched directory, of safetensors or of ONNX graphs, and the model that it was made from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sasa_export.errors import EvaluateError, OpenError
from sasa_export.graph import blocks_again
from sasa_export.manifest import MANIFEST, digest
from sasa_export.models import Source, open_source, read_config
from sasa_export.models.load import read_sizes
from sasa_export.verify import FORMATS
from sasa_export.verify.files import check_manifest
from sasa_export.verify.onnx import dtype_of


@dataclass(frozen=True)
class Guarded:
    """A patched directory whose files are those that were exported; nothing of it is loaded.

    `graphs` is the type of its ONNX graphs, None where it holds safetensors; `sasa` the settings of its gate; `made`
    the options that it was patched with; `files` the SHA-256 of each file.
    """

    directory: Path
    graphs: str | None
    sasa: dict[str, Any]
    made: dict[str, Any]
    files: dict[str, str]

    @property
    def format(self) -> str:
        return "safetensors" if self.graphs is None else "onnx"

    @property
    def blocks(self) -> int:
        return sum(node["op"] == "block" for node in self.sasa["graph"])

    @property
    def again(self) -> int:
        """How many blocks the second lane has, or all of them together."""
        return len(blocks_again(self.sasa["graph"]))

    @property
    def further_pairs(self) -> tuple[tuple[int, int], ...]:
        """Pairs of safety and semantic layer behind the first."""
        return tuple((safety, semantic) for safety, semantic in self.sasa.get("further_pairs", []))

    @property
    def refusal(self) -> list[int]:
        """The refusal's token ids, end of sequence last."""
        return list(self.sasa["refusal_token_ids"])


def open_guarded(directory: Path) -> Guarded:
    """Read a patched directory, and check every file's SHA-256. Raises EvaluateError, or OpenError for no model."""
    if not directory.is_dir():
        raise EvaluateError(f"there is no directory {directory}. Give a patched model as --model.")
    both = [directory / name for name in FORMATS]
    if not (directory / "config.json").exists() and all((path / "config.json").exists() for path in both):
        raise EvaluateError(f"{directory} holds two patched models. Give {both[0]} or {both[1]} as --model.")
    config = read_config(directory)
    sasa = config.get("sasa")
    if not isinstance(sasa, dict) or not isinstance(sasa.get("graph"), list):
        raise EvaluateError(
            f"{directory} is no patched model: its config.json has no gate. Patch it first: sasa-export --model "
            f"{directory} --out patched/."
        )
    check = check_manifest(directory)
    if not check.passed:
        raise EvaluateError(
            f"{directory} is not what was exported ({check.detail}), and evaluating it would run its code. Export the "
            "model again."
        )
    manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    return Guarded(directory, dtype_of(directory), sasa, dict(manifest.get("options") or {}), dict(manifest["files"]))


def open_baseline(guarded: Guarded, given: str | None) -> Source:
    """The model that a patched one was made from: `given`, or what its manifest names.

    Raises EvaluateError where it is another model: of another size, or with other weights.
    """
    name = given or guarded.made.get("model")
    if not name:
        raise EvaluateError(f"{guarded.directory} does not say what it was made from. Give it as --baseline.")
    try:
        source = open_source(str(name))
    except OpenError as error:
        if given:
            raise
        raise EvaluateError(f"the original of {guarded.directory} is not there: {error} Or give --baseline.") from None
    sizes = read_sizes(source)
    if sizes.blocks != guarded.blocks:
        raise EvaluateError(
            f"{source.name} has {sizes.blocks} blocks, and what {guarded.directory} was made from has "
            f"{guarded.blocks}. Give its original as --baseline."
        )
    copied = set(guarded.files.values())
    for shard in source.shards if guarded.graphs is None else ():
        if digest(shard.path) not in copied:  # shards are copied byte for byte
            raise EvaluateError(
                f"{shard.path} is none of the weights in {guarded.directory}, so {source.name} is not what it was made "
                "from. Give its original as --baseline."
            )
    return source
