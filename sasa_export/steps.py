"""The steps of a patch that are the same for torch models and for ONNX graphs that others exported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sasa_export.errors import VerifyError
from sasa_export.files import check_apart, check_disk, staged
from sasa_export.graph import LayerGraph
from sasa_export.graph.rewrite import LaneSettings, rewrite
from sasa_export.layers.pairs import default_pairs, possible
from sasa_export.manifest import check_ours
from sasa_export.models import Source, layers_of
from sasa_export.models.load import SPREAD, Sizes
from sasa_export.options import Options
from sasa_export.probe import Calibration, Fitted, with_threshold
from sasa_export.probe.figures import verdict_on_projection
from sasa_export.probe.fit import Probe
from sasa_export.probe.given import check_probe, read_probe
from sasa_export.prompts import Prompt, calibration_prompts, for_model, lopsided
from sasa_export.report import Check, Silent
from sasa_export.workers import workers
from sasa_export.writers.cases import Asked, expect, known
from sasa_export.writers.config import refusal_ids, sasa_settings
from sasa_export.writers.directory import Patch
from sasa_export.writers.onnx.memory import needed_bytes

SPARE_BYTES = 64_000_000  # processor, tokenizer, card, scores and verification pictures


@dataclass(frozen=True)
class Plan:
    """A model that was opened and traced, and what is to be made of it; nothing of it is in memory.

    `settings` are stand-ins where the layers are still to be found. `given` is the probe of `--probe`. `prompts` are
    what is calibrated and verified with; none where neither is done.
    """

    source: Source
    sizes: Sizes
    processor: Any
    graph: LayerGraph
    settings: LaneSettings
    layers_from: str
    given: Probe | None
    prompts: list[Prompt]


def read_inputs(options: Options, report: Silent) -> tuple[Probe | None, list[Prompt]]:
    """The probe that is given, if any, and what is calibrated on, before the model is opened, which may take long."""
    given = read_probe(options.probe, options.threshold) if options.probe else None
    if given is not None and options.verify == "files":
        return given, []
    prompts = calibration_prompts(options.calibration, report)
    warning = lopsided(prompts)
    if warning is not None:
        report.warn(warning)
    return given, prompts


def check_output(source: Source, options: Options) -> None:
    """Raise EmitError where the output would remove what it is made from, or the disk is too small for it."""
    check_apart(options.out, source.directory, options.probe, *map(Path, options.calibration))
    check_disk(options.out, needed_disk(source, options))


def needed_disk(source: Source, options: Options) -> int:
    """Bytes of disk below --out, at most. The graphs are made from a copy for transformers, wanted or not."""
    needed = SPARE_BYTES + (0 if options.link else source.weight_bytes())
    if options.format != "safetensors":
        needed += SPARE_BYTES + needed_bytes(source, options.onnx_dtype)
    return needed


def make_plan(
    source: Source,
    sizes: Sizes,
    processor: Any,
    graph: LayerGraph,
    inputs: tuple[Probe | None, list[Prompt]],
    options: Options,
    report: Silent,
) -> Plan:
    """What is to be made of a traced model. What does not go together is an error here, before the work."""
    given, prompts = inputs
    refusal_ids(processor, source.directory, options.refusal)
    settings, layers_from = _layers(source, sizes, graph, options, report)
    full = rewrite(graph, settings)
    check_probe(given, sizes.vocabulary if full.of("lane_head") else sizes.hidden)
    return Plan(source, sizes, processor, graph, settings, layers_from, given, for_model(prompts, processor))


def _layers(
    source: Source, sizes: Sizes, graph: LayerGraph, options: Options, report: Silent
) -> tuple[LaneSettings, str]:
    """The settings of the second lane, and where its layers are from."""
    given = [layer if isinstance(layer, int) else None for layer in (options.safety_layer, options.semantic_layer)]
    safety: int | None
    semantic: int | None
    safety, semantic, layers_from = layers_of(source, sizes.blocks, sizes.hidden, *given)
    if options.projection == "none":
        safety = semantic = None
        layers_from = "none: made without projection"
    elif options.finds_layers():
        safety, semantic = possible(default_pairs(sizes.blocks, *given), graph.earliest_safety_layer())[0]
    elif None in given and source.family.known_layers(sizes.blocks, sizes.hidden) is None:
        report.warn(f"safety layer {safety} and semantic layer {semantic} are {layers_from}.")
    return LaneSettings(safety, semantic, softcap=sizes.softcap), layers_from


def choose_threshold(
    fitted: Fitted, prompts: Sequence[Prompt], options: Options, report: Silent, judged: Sequence[int] | None = None
) -> Calibration:
    """The probe with its threshold, and its figures, as of `with_threshold`; they are reported."""
    found = with_threshold(
        fitted, prompts, max_false_positive_rate=options.max_false_positive_rate, threshold=options.threshold,
        judged=judged,
    )  # fmt: skip
    overall = next(figure for figure in found.figures if figure.part == "all")  # of the probe that was made
    report.step(
        "calibrate",
        f"{len(prompts)} prompts: AUC {overall.auc:.3f}, {overall.recall:.1%} of the harmful caught, "
        f"{overall.false_positive_rate:.1%} of the ordinary ones refused (cross-validated)",
    )
    report.step("", verdict_on_projection(found.figures))
    for warning in found.warnings():
        report.warn(warning)
    return found


def make_patch(
    plan: Plan,
    calibration: Calibration | None,
    ask: Callable[[Prompt], Asked] | None,
    dtype: str,
    device: str,
    options: Options,
    report: Silent,
    more: dict[str, Any] | None = None,
) -> Patch:
    """What is to be written. Args: ask: as of `expect`, None without verification; more: of config.json."""
    probe, scores = (plan.given, None) if calibration is None else (calibration.probe, calibration.final)
    assert probe is not None
    cases = () if ask is None else tuple(expect(ask, probe, plan.prompts, scores))
    graph, pair = rewrite(plan.graph, plan.settings), plan.settings.pair
    lane = "no second lane" if pair is None else f"second lane from block {pair[0] + 1}"
    report.step("rewrite", f"{lane}, threshold {probe.threshold:.4f}")
    sasa = sasa_settings(
        plan.source, plan.processor, graph, plan.settings, layers_from=plan.layers_from, threshold=probe.threshold,
        refusal=options.refusal, gate=options.gate, known=known(cases),
    )  # fmt: skip
    device = "auto" if device == SPREAD else device
    sasa |= more or {}
    return Patch(options.out, plan.source, graph, sasa, probe, calibration, cases, dtype, device)


def write_and_verify(
    patch: Patch, options: Options, report: Silent, write: Callable[[Patch, Path, Options, Silent], None]
) -> Patch:
    """Write beside `options.out`, verify, and only then show it there; the first process does it for all.

    Args: write: writes a patch into an empty directory, and verifies it.
    """
    if workers().leads:
        needed = needed_disk(patch.source, options)
        with staged(options.out, force=options.force, needed_bytes=needed) as staging:
            write(patch, staging, options, report)
            check_ours(options.out)  # again: the work may have taken hours
        report.step("done", f"{options.out}")
    return patch


def all_passed(checks: Sequence[Check], report: Silent) -> None:
    """Report the checks. VerifyError where one failed."""
    for check in checks:
        report.check(check.passed, check.name, check.detail)
    failed = [check for check in checks if check.passed is False]
    if failed:
        raise VerifyError(
            f"{len(failed)} of {len(checks)} checks failed ({failed[0].name}: {failed[0].detail}), "
            "so nothing was written."
        )
