"""What is evaluated, opened and checked, and how it runs. No weights are loaded yet."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sasa_export.errors import EvaluateError, OpenError
from sasa_export.files import check_apart
from sasa_export.graph import blocks_again, lane_tokens
from sasa_export.graph.rewrite import LaneSettings
from sasa_export.manifest import MANIFEST, digest
from sasa_export.models import layers_of, open_source
from sasa_export.models.contents import read_object
from sasa_export.options import AUTO, REACH, check_for_graphs, number_of
from sasa_export.original import Original, TorchOriginal, running_as
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
from sasa_export.verify.unloaded import check_manifest, dtype_of


@dataclass(frozen=True)
class Subject:
    """A patched model, its original, and the prompts of both kinds, which share no picture and no question.

    Attributes:
        original: what it was made from.
        graphs: the type of the patched model's ONNX graphs; None where it is a directory of safetensors.
        sasa: the settings of its gate; made: the options it was made with, as its sasa-export.json says.
        against: the settings of the gate of --against; None without.
        evaluation: the prompts asked; `left_out` of them, by --limit.
        calibration: what the fitted arms are fitted on, and `calibrated_on` its name.
        lane: the settings of the second lane, from which the fitted arms read their features.
        bundled: the probes that the embedded model ships with, where these are what would be fitted.
    """

    options: EvaluateOptions
    original: Original
    graphs: str | None
    sasa: dict[str, Any]
    against: dict[str, Any] | None
    made: dict[str, Any]
    evaluation: list[Prompt]
    left_out: int
    calibration: list[Prompt]
    calibrated_on: str
    lane: LaneSettings
    bundled: Fitted | None

    @property
    def batch_size(self) -> int:
        """Of the answers, which are compared and so run in the same batches in both models."""
        return self.options.batch_size if self.graphs is None else 1

    @property
    def rate(self) -> float:
        """The largest false-positive rate that the threshold was chosen for, unless the threshold was given."""
        return float(self.made.get("max_false_positive_rate", 0.02))

    @property
    def regularization(self) -> float | None:
        """The C that the probe was fitted with; None where cross-validation chose it."""
        return number_of(self.made.get("regularization", AUTO))

    def fingerprint(self) -> dict[str, Any]:
        """What finished work depends on."""
        return fingerprint(
            self.original.source,
            [*self.evaluation, *(self.calibration if self.bundled is None else [])],
            patched=_digests(self.options.model),
            against=self.options.against and _digests(self.options.against),
            batch_size=self.options.batch_size,
            max_new_tokens=self.options.max_new_tokens,
            **running_as(self.original),
        )

    def described(self) -> dict[str, Any]:
        """What was evaluated, on what, and how it ran; `made_with` says how the report is made again."""
        given = self.made.get("threshold") or self.made.get("probe")
        return {
            "model": self.options.model.resolve().name,
            "baseline": last_name(self.original.source.name),
            "family": self.original.source.family.name,
            "against": "" if self.options.against is None else self.options.against.resolve().name,
            "graphs": self.graphs,
            "safety_layer": self.sasa["safety_layer"],
            "semantic_layer": self.sasa["semantic_layer"],
            "blocks": self.original.sizes.blocks,
            "lane_blocks": len(blocks_again(self.sasa["graph"])),
            "lane_tokens": lane_tokens(self.sasa["graph"]),
            "false_positive_rate": self.rate,
            "given_threshold": self.sasa["threshold"] if given else None,
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
    """Open all that is evaluated. Raises SasaExportError where something is missing or does not belong together."""
    sasa, manifest = _read_patched(options.model)
    against = None if options.against is None else _read_patched(options.against)[0]
    made = manifest.get("options") or {}
    prompts = load_all(options.data, report=report) if options.data else builtin_evaluation()
    specs = options.calibration or made.get("calibration") or ()
    calibration = calibration_prompts(specs, report)
    check_disjoint(calibration, prompts)
    original = _open_baseline(options, sasa, manifest)
    source, sizes = original.source, original.sizes
    check_apart(options.out, options.model, source.directory)
    report.step("open", f"{options.model}, made from {source.name}")
    prompts, calibration = original.readable(prompts, report), original.readable(calibration, Silent())
    check_labels(prompts, 1, "--data", "an evaluation")
    share = 1 if options.limit is None else options.limit / len(prompts)
    evaluation = share_of(prompts, share, lambda prompt: (prompt.source, prompt.attack, prompt.label))
    found = counts(evaluation)
    report.step("data", f"{found['harmful']} harmful and {found['harmless']} harmless prompts")
    # Where the patched model has no second lane, what the family's layers would give, to compare it with.
    layers = layers_of(source, sizes.blocks, sizes.hidden, sasa["safety_layer"], sasa["semantic_layer"])
    lane = LaneSettings(*layers[:2], sasa["epsilon"], sizes.softcap, lane_tokens(sasa["graph"]) or REACH)
    return Subject(
        options, original, dtype_of(options.model), sasa, against, made, evaluation, len(prompts) - len(evaluation),
        calibration, ", ".join(specs) or "the built-in calibration set", lane,
        bundled.read(source.name, lane, specs, made.get("regularization", AUTO)),
    )  # fmt: skip


def _read_patched(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of the gate and the manifest. Raises EvaluateError, or OpenError for no model."""
    sasa = read_gate(directory)
    if sasa.get("gate") == "observe" and dtype_of(directory) is not None:
        raise EvaluateError(f"the graphs in {directory} only observe. Export them again with --gate enforce.")
    if sasa.get("format") != FORMATS[-1]:
        raise EvaluateError(f"{directory} is of an earlier sasa-export, whose probe read less. Export the model again.")
    check = check_manifest(directory)
    if check.passed is False:
        raise EvaluateError(
            f"{directory} is not what was exported ({check.detail}), so its figures would be of something else. "
            "Export the model again."
        )
    # A model that was saved again has no manifest; --baseline then says what it was made from.
    return sasa, read_object(directory / MANIFEST)


def _open_baseline(options: EvaluateOptions, sasa: dict[str, Any], manifest: dict[str, Any]) -> Original:
    """What the patched model was made from: --baseline, or what the manifest names.

    Raises EvaluateError where it is another model: of another size, or with other weights.
    """
    name, graphs = options.baseline or (manifest.get("options") or {}).get("model"), None
    if not name:
        raise EvaluateError(f"{options.model} does not say what it was made from. Give it as --baseline.")
    try:
        if "graphs" in sasa:
            from sasa_export.foreign.original import GraphOriginal

            check_for_graphs(options)
            graphs = GraphOriginal(name, tuple(sasa["graphs"].values()))
            source = graphs.source
        else:
            source = open_source(name, None if options.baseline else manifest.get("commit"))
    except OpenError as error:
        if options.baseline:
            raise
        raise EvaluateError(f"the original of {options.model} is not there: {error} Or give --baseline.") from None
    original = graphs or TorchOriginal(source, options.dtype, options.device)
    weights = [shard.path for shard in source.shards if graphs is None or shard.path != graphs.graphs.decoder]
    copied = set(manifest.get("files", {}).values())  # shards are copied byte for byte, and so is what a graph reads
    compared = copied and (graphs is not None or dtype_of(options.model) is None)
    other_weights = compared and not all(digest(path) in copied for path in weights)
    if other_weights or original.sizes.blocks != sum(node["op"] == "block" for node in sasa["graph"]):
        raise EvaluateError(
            f"{options.model} was not made from {source.name}, whose weights are others. Give its original as "
            "--baseline."
        )
    return original


def _digests(directory: Path) -> list[str]:
    """Of the files that say which model this is: its manifest, or, where it was saved again, settings and weights."""
    manifest, settings = directory / MANIFEST, directory / "config.json"
    told = [manifest] if manifest.exists() else [settings, *sorted(directory.glob("*.safetensors"))]
    return [digest(path) for path in told]
