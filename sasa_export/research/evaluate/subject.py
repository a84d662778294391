"""The subject of an evaluation: models, prompts and settings, opened and checked. No weights are loaded."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sasa_export.backends import Original, open_original, running_as
from sasa_export.errors import EvaluateError, OpenError
from sasa_export.files import check_apart
from sasa_export.gate import GateSpec
from sasa_export.graph.rewrite import LaneSettings
from sasa_export.manifest import MANIFEST, digest
from sasa_export.models import layers_of
from sasa_export.models.contents import read_object
from sasa_export.onnx import graphs_of
from sasa_export.options import AUTO, number_of
from sasa_export.probe import bundled
from sasa_export.probe.calibration import Fitted
from sasa_export.probe.work import fingerprint
from sasa_export.prompts import Prompt, builtin_evaluation, calibration_prompts, check_disjoint, check_labels, load_all
from sasa_export.prompts.shares import counts, share_of
from sasa_export.report import Silent
from sasa_export.research.evaluate.models import read_gate
from sasa_export.research.options import EvaluateOptions
from sasa_export.research.report import last_name, made_with
from sasa_export.runtime.settings import FORMATS
from sasa_export.verify.unloaded import check_manifest
from sasa_export.writers.directory import PROBES


@dataclass(frozen=True)
class Subject:
    """A patched model, its original, and two sets of prompts, which share no picture and no question.

    Attributes:
        original: the model before patching.
        graphs: the dtype of the patched model's ONNX graphs. None for a directory of safetensors.
        gate: the patched model's gate; `made`: its export options, from sasa-export.json.
        against: the gate of --against, or None.
        evaluation: the prompts that are asked; `left_out`: how many prompts --limit removed.
        calibration: the prompts that the fitted arms are fitted on; `calibrated_on`: the name of that set.
        lane: the settings of the second lane, which gives the features of the fitted arms.
        fitted: ready probes for the fitted arms, shipped with smol-llava or in the patched directory, or None.
    """

    options: EvaluateOptions
    original: Original
    graphs: str | None
    gate: GateSpec
    against: GateSpec | None
    made: dict[str, Any]
    evaluation: list[Prompt]
    left_out: int
    calibration: list[Prompt]
    calibrated_on: str
    lane: LaneSettings
    fitted: Fitted | None

    @property
    def batch_size(self) -> int:
        """The batch size of the answers. Both models use the same batches, which makes answers comparable."""
        return self.options.batch_size if self.graphs is None else 1

    @property
    def rate(self) -> float:
        """The largest false-positive rate that a chosen threshold may have. A given threshold ignores it."""
        return float(self.made.get("max_false_positive_rate", 0.02))

    @property
    def regularization(self) -> float | None:
        """The C that the probe was fitted with. None where cross-validation chose it."""
        return number_of(self.made.get("regularization", AUTO))

    def fingerprint(self) -> dict[str, Any]:
        """Return everything that finished work depends on."""
        return fingerprint(
            self.original.source,
            [*self.evaluation, *(self.calibration if self.fitted is None else [])],
            patched=_digests(self.options.model),
            against=self.options.against and _digests(self.options.against),
            batch_size=self.options.batch_size,
            max_new_tokens=self.options.max_new_tokens,
            **running_as(self.original),
        )

    def described(self) -> dict[str, Any]:
        """Return the models, prompts and settings for the report. `made_with` is the command that repeats it."""
        given = self.made.get("threshold") or self.made.get("probe")
        return {
            "model": self.options.model.resolve().name,
            "baseline": last_name(self.original.source.name),
            "family": self.original.source.family.name,
            "against": "" if self.options.against is None else self.options.against.resolve().name,
            "graphs": self.graphs,
            "safety_layer": self.gate.safety_layer,
            "semantic_layer": self.gate.semantic_layer,
            "blocks": self.original.sizes.blocks,
            "lane_blocks": len(self.gate.blocks_again),
            "lane_tokens": self.gate.lane_tokens,
            "false_positive_rate": self.rate,
            "given_threshold": self.gate.threshold if given else None,
            **running_as(self.original),
            **counts(self.evaluation),
            "data": ", ".join(self.options.data) or "the built-in evaluation set",
            "texts_alone": not self.original.sees,
            "left_out": self.left_out,
            "calibrated_on": self.calibrated_on,
            "max_new_tokens": self.options.max_new_tokens,
            "batch_size": self.batch_size,
            "made_with": made_with("evaluate", self.options),
        }


def open_subject(options: EvaluateOptions, report: Silent) -> Subject:
    """Open the models and prompts of an evaluation. Raise SasaExportError where a part is missing or does not fit."""
    gate, manifest = _read_patched(options.model)
    against = None if options.against is None else _read_patched(options.against)[0]
    made = manifest.get("options") or {}
    prompts = load_all(options.data, report=report) if options.data else builtin_evaluation()
    specs = options.calibration or made.get("calibration") or ()
    calibration = calibration_prompts(specs, report)
    check_disjoint(calibration, prompts)
    original = _open_baseline(options, gate, manifest)
    source, sizes = original.source, original.sizes
    check_apart(options.out, options.model, source.directory)
    report.step("open", f"{options.model}, made from {source.name}")
    prompts, calibration = original.readable(prompts, report), original.readable(calibration, Silent())
    check_labels(prompts, 1, "--data", "an evaluation")
    share = 1 if options.limit is None else options.limit / len(prompts)
    evaluation = share_of(prompts, share, lambda prompt: (prompt.source, prompt.attack, prompt.label))
    found = counts(evaluation)
    report.step("data", f"{found['harmful']} harmful and {found['harmless']} harmless prompts")
    # A patched model without a second lane is compared with the layers in the family's file.
    layers = layers_of(source, sizes.blocks, sizes.hidden, gate.safety_layer, gate.semantic_layer)
    lane = replace(gate.lane, safety_layer=layers[0], semantic_layer=layers[1], softcap=sizes.softcap)
    fitted = bundled.read(source.name, lane, specs, made.get("regularization", AUTO))
    fitted = fitted or bundled.load(options.model / PROBES, bundled.origin_of(calibration, lane))
    return Subject(
        options, original, graphs_of(options.model).get("dtype"), gate, against, made, evaluation,
        len(prompts) - len(evaluation), calibration, ", ".join(specs) or "the built-in calibration set", lane,
        fitted,
    )  # fmt: skip


def _read_patched(directory: Path) -> tuple[GateSpec, dict[str, Any]]:
    """Return the gate and the manifest of a patched directory. Raise EvaluateError, or OpenError for no model."""
    gate = read_gate(directory)
    if gate.observes and graphs_of(directory):
        raise EvaluateError(f"the graphs in {directory} only observe. Export them again with --gate enforce.")
    if gate.format != FORMATS[-1]:
        raise EvaluateError(f"{directory} is of an earlier sasa-export, whose probe read less. Export the model again.")
    check = check_manifest(directory)
    if check.passed is False:
        raise EvaluateError(
            f"{directory} is not what was exported ({check.detail}), so its figures would be of something else. "
            "Export the model again."
        )
    # A model that was saved again has no manifest. --baseline then names its original.
    return gate, read_object(directory / MANIFEST)


def _open_baseline(options: EvaluateOptions, gate: GateSpec, manifest: dict[str, Any]) -> Original:
    """Open the original of the patched model: --baseline, or the model that the manifest names.

    Raises EvaluateError where that model has another number of blocks or other weights.
    """
    name = options.baseline or (manifest.get("options") or {}).get("model")
    if not name:
        raise EvaluateError(f"{options.model} does not say what it was made from. Give it as --baseline.")
    commit = None if options.baseline else manifest.get("commit")
    try:
        original = open_original(options, name, commit, tuple((gate.graphs or {}).values()))
    except OpenError as error:
        if options.baseline:
            raise
        raise EvaluateError(f"the original of {options.model} is not there: {error} Or give --baseline.") from None
    copied = set(manifest.get("files", {}).values())
    other_weights = copied and not all(digest(path) in copied for path in original.unchanged(gate))
    if other_weights or original.sizes.blocks != gate.blocks:
        raise EvaluateError(
            f"{options.model} was not made from {original.source.name}, whose weights are others. Give its original as "
            "--baseline."
        )
    return original


def _digests(directory: Path) -> list[str]:
    """Return digests that identify a model: of its manifest, or without one, of its config.json and weights."""
    manifest, settings = directory / MANIFEST, directory / "config.json"
    told = [manifest] if manifest.exists() else [settings, *sorted(directory.glob("*.safetensors"))]
    return [digest(path) for path in told]
