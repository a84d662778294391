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
class Patched:
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
    def lane_blocks(self) -> int:
        """How many blocks the second lane has."""
        return len(blocks_again(self.sasa["graph"]))

    @property
    def rate(self) -> float:
        """The largest false-positive rate that its threshold was chosen for, unless the threshold was given."""
        return float(self.made.get("max_false_positive_rate", 0.02))

    @property
    def given_threshold(self) -> float | None:
        """The threshold, where it was given and not chosen for a false-positive rate."""
        return self.sasa["threshold"] if self.made.get("threshold") or self.made.get("probe") else None

    @property
    def regularization(self) -> float | None:
        """The C that the probe was fitted with; None where cross-validation chose it."""
        given = self.made.get("regularization", "auto")
        return None if given == "auto" else float(given)


def open_patched(directory: Path) -> Patched:
    """Read a patched directory, and check every file's SHA-256. Raises EvaluateError, or OpenError for no model."""
    if not directory.is_dir():
        raise EvaluateError(f"{directory} is not a directory. Give a patched model as --model.")
    both = [directory / name for name in FORMATS]
    if not (directory / "config.json").exists() and all((path / "config.json").exists() for path in both):
        raise EvaluateError(f"{directory} holds two patched models. Give {both[0]} or {both[1]} as --model.")
    sasa = read_config(directory).get("sasa")
    if not isinstance(sasa, dict):
        raise EvaluateError(
            f"{directory} is no patched model: its config.json has no gate. Patch it first: sasa-export --model "
            f"{directory} --out patched/."
        )
    check = check_manifest(directory)
    if not check.passed:
        raise EvaluateError(
            f"{directory} is not what was exported ({check.detail}), so its figures would be of something else. "
            "Export the model again."
        )
    manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    return Patched(directory, dtype_of(directory), sasa, manifest.get("options") or {}, manifest["files"])


def open_baseline(patched: Patched, given: str | None) -> Source:
    """The model that a patched one was made from: `given`, or what its manifest names.

    Raises EvaluateError where it is another model: of another size, or with other weights.
    """
    name = given or patched.made.get("model")
    if not name:
        raise EvaluateError(f"{patched.directory} does not say what it was made from. Give it as --baseline.")
    try:
        source = open_source(str(name))
    except OpenError as error:
        if given:
            raise
        raise EvaluateError(f"the original of {patched.directory} is not there: {error} Or give --baseline.") from None
    blocks = read_sizes(source).blocks
    if blocks != patched.blocks:
        raise EvaluateError(
            f"{source.name} has {blocks} blocks, and what {patched.directory} was made from has {patched.blocks}. Give "
            "its original as --baseline."
        )
    copied = set(patched.files.values())
    for shard in source.shards if patched.graphs is None else ():
        if digest(shard.path) not in copied:  # shards are copied byte for byte
            raise EvaluateError(
                f"{shard.path} is none of the weights in {patched.directory}, so {source.name} is not what it was made "
                "from. Give its original as --baseline."
            )
    return source
