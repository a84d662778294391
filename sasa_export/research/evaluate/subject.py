"""What is evaluated, opened and checked, and how it runs. No weights are loaded yet."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sasa_export.errors import EvaluateError, OpenError
from sasa_export.files import check_apart
from sasa_export.graph import LayerGraph, blocks_again
from sasa_export.graph.rewrite import LaneSettings, rewrite_lane
from sasa_export.graph.trace import trace_source
from sasa_export.manifest import MANIFEST, digest
from sasa_export.models import Source, layers_of, open_source, read_config
from sasa_export.models.load import load_processor, read_sizes, running
from sasa_export.prompts.prompt import Prompt
from sasa_export.report import Silent
from sasa_export.research.evaluate.options import EvaluateOptions
from sasa_export.research.evaluate.prompts import evaluation_prompts, fitting_prompts, limited
from sasa_export.research.work import fingerprint
from sasa_export.verify import FORMATS
from sasa_export.verify.files import check_manifest
from sasa_export.verify.onnx import dtype_of
from sasa_export.workers import Workers


@dataclass(frozen=True)
class Subject:
    """A patched model, its original, and the prompts of both kinds, which share no picture and no question.

    Attributes:
        graphs: the type of the patched model's ONNX graphs; None where it is a directory of safetensors.
        sasa: the settings of its gate; manifest: its sasa-export.json.
        left_out: how many evaluation prompts --limit left out.
        calibration: what the fitted arms are fitted on, and `calibrated_on` its name.
        lane: the second lane, from which the fitted arms read their features.
    """

    options: EvaluateOptions
    graphs: str | None
    sasa: dict[str, Any]
    manifest: dict[str, Any]
    source: Source
    processor: Any
    evaluation: list[Prompt]
    left_out: int
    calibration: list[Prompt]
    calibrated_on: str
    lane: LayerGraph
    dtype: str
    device: str

    @property
    def batch_size(self) -> int:
        """Of the answers, which are compared and so run in the same batches in both models."""
        return self.options.batch_size if self.graphs is None else 1

    @property
    def blocks(self) -> tuple[int, int]:
        """How many blocks the decoder and the patched model's second lane have."""
        return _blocks(self.sasa), len(blocks_again(self.sasa["graph"]))

    @property
    def rate(self) -> float:
        """The largest false-positive rate that the threshold was chosen for, unless the threshold was given."""
        return float(self.manifest["options"].get("max_false_positive_rate", 0.02))

    @property
    def given_threshold(self) -> float | None:
        """The threshold, where it was given and not chosen for a false-positive rate."""
        made = self.manifest["options"]
        return self.sasa["threshold"] if made.get("threshold") or made.get("probe") else None

    @property
    def regularization(self) -> float | None:
        """The C that the probe was fitted with; None where cross-validation chose it."""
        given = self.manifest["options"].get("regularization", "auto")
        return None if given == "auto" else float(given)

    def fingerprint(self) -> dict[str, Any]:
        """What finished work depends on."""
        return fingerprint(
            self.source,
            [*self.evaluation, *self.calibration],
            patched=digest(self.options.model / MANIFEST),
            dtype=self.dtype,
            device=self.device.partition(":")[0],
            batch_size=self.options.batch_size,
            max_new_tokens=self.options.max_new_tokens,
        )


def open_subject(options: EvaluateOptions, team: Workers, report: Silent) -> Subject:
    """Open all that is evaluated. Raises SasaExportError where something is missing or does not belong together."""
    sasa, manifest = _read_patched(options.model)
    source = _open_baseline(options, sasa, manifest)
    check_apart(options.out, options.model, source.directory)
    report.step("open", f"{options.model}, made from {source.name}")
    processor = load_processor(source)

    def pieces(word: str) -> int:
        return len(processor.tokenizer.encode(f" {word}", add_special_tokens=False))

    everything = evaluation_prompts(options.data, pieces)
    made_on = manifest["options"].get("calibration") or ()
    calibration, calibrated_on = fitting_prompts(options.calibration, made_on, everything, pieces)
    evaluation = limited(everything, options.limit)
    harmful = sum(prompt.label for prompt in evaluation)
    report.step("data", f"{harmful} harmful and {len(evaluation) - harmful} harmless prompts")
    dtype, device = running(source, options.dtype, team.device(options.device))
    return Subject(
        options, dtype_of(options.model), sasa, manifest, source, processor, evaluation,
        len(everything) - len(evaluation), calibration, calibrated_on, _lane(sasa, source), dtype, device,
    )  # fmt: skip


def _read_patched(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of the gate and the manifest. Raises EvaluateError, or OpenError for no model."""
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
    return sasa, {**manifest, "options": manifest.get("options") or {}}


def _open_baseline(options: EvaluateOptions, sasa: dict[str, Any], manifest: dict[str, Any]) -> Source:
    """The model that the patched one was made from: --baseline, or what the manifest names.

    Raises EvaluateError where it is another model: of another size, or with other weights.
    """
    name = options.baseline or manifest["options"].get("model")
    if not name:
        raise EvaluateError(f"{options.model} does not say what it was made from. Give it as --baseline.")
    try:
        source = open_source(name)
    except OpenError as error:
        if options.baseline:
            raise
        raise EvaluateError(f"the original of {options.model} is not there: {error} Or give --baseline.") from None
    copied = set(manifest["files"].values())  # shards are copied byte for byte
    other_weights = dtype_of(options.model) is None and not all(digest(shard.path) in copied for shard in source.shards)
    if other_weights or read_sizes(source).blocks != _blocks(sasa):
        raise EvaluateError(
            f"{options.model} was not made from {source.name}, whose weights are others. Give its original as "
            "--baseline."
        )
    return source


def _blocks(sasa: dict[str, Any]) -> int:
    return sum(node["op"] == "block" for node in sasa["graph"])


def _lane(sasa: dict[str, Any], source: Source) -> LayerGraph:
    """The patched model's second lane; where it has none, what the family's layers would give, to compare it with."""
    sizes = read_sizes(source)
    layers = layers_of(source, sizes.blocks, sizes.hidden, sasa["safety_layer"], sasa["semantic_layer"])
    settings = LaneSettings(*layers[:2], sasa["epsilon"], sizes.softcap, sasa.get("probe_block"))
    return rewrite_lane(trace_source(source), settings)
