"""The whole tool on one page: open -> trace -> calibrate -> rewrite -> write -> verify."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sasa_export.backends import Original, open_original, running_as
from sasa_export.files import check_apart, check_disk, staged
from sasa_export.gate import GateSpec
from sasa_export.graph.rewrite import LaneSettings, rewrite
from sasa_export.layers.auto import choose_layers
from sasa_export.layers.pairs import default_pairs, possible
from sasa_export.manifest import check_ours, write_manifest
from sasa_export.models import Source, layers_of
from sasa_export.models.load import SPREAD
from sasa_export.onnx.directory import made_with, write_onnx_card
from sasa_export.onnx.memory import needed_bytes
from sasa_export.options import Options, number_of
from sasa_export.probe import bundled
from sasa_export.probe.calibration import Calibration, Fitted, with_threshold
from sasa_export.probe.figures import verdict_on_projection
from sasa_export.probe.file import check_probe, read_probe
from sasa_export.probe.fit import Probe
from sasa_export.probe.work import Work, fingerprint, resumable
from sasa_export.prompts import Prompt, calibration_prompts, lopsided
from sasa_export.report import Check, Silent, all_passed
from sasa_export.verify import check_written
from sasa_export.workers import workers
from sasa_export.writers.card import write_card
from sasa_export.writers.cases import Case, expect, known
from sasa_export.writers.config import gate_of
from sasa_export.writers.directory import Patch, Written

SPARE_BYTES = 64_000_000  # processor, tokenizer, card, scores and verification pictures


def patch(options: Options, report: Silent | None = None) -> Patch:
    """Turn a vision-language model into a guarded one. Where this raises SasaExportError, nothing is written.

    Several processes (`sasa_export.workers`) share the calibration; the first one writes the model. The same call
    resumes an interrupted calibration.
    """
    team = workers()
    report = report if report is not None and team.leads else Silent()
    options.check()
    with resumable(options.out, force=options.force, report=report) as work:
        team.wait()  # no process writes while another still checks the output
        given, prompts = read_inputs(options, report)  # before the model is opened, which may take minutes
        original = open_original(options)
        source, needed = original.source, needed_disk(original.source, options)
        check_apart(options.out, source.directory, options.probe, *map(Path, options.calibration))
        check_disk(options.out, needed)
        report.step("open", f"{source.name}: family {source.family.name}, {source.weight_bytes() / 1e6:,.0f} MB")
        with original.explained():
            made = measure(original, given, prompts, options, work, report)
            if team.leads:
                with staged(options.out, force=options.force, needed_bytes=needed) as staging:
                    for written in original.write(made, staging, options, report):
                        finish(original, written, options, report)
                    check_ours(options.out)  # again: the work may have taken hours
                report.step("done", f"{options.out}")
        return made


def read_inputs(options: Options, report: Silent) -> tuple[Probe | None, list[Prompt]]:
    """Return the given probe, if any, and the prompts for calibration and verification (none if neither is done)."""
    given = read_probe(options.probe, options.threshold) if options.probe else None
    if given is not None and options.verify == "files":
        return given, []
    prompts = calibration_prompts(options.calibration, report)
    warning = lopsided(prompts)
    if warning is not None:
        report.warn(warning)
    return given, prompts


def measure(
    original: Original, given: Probe | None, prompts: list[Prompt], options: Options, work: Work, report: Silent
) -> Patch:
    """Calibrate unless a probe is given, and record the original model's answers for verification.

    Wrong settings, prompts and probes raise errors before the weights are loaded.
    """
    source, sizes = original.source, original.sizes
    prompts = original.readable(prompts, report)
    described = gate_of(source, original.processor, options.refusal)
    settings, layers_from = lane_of(original, options, report)  # provisional layers where the search follows below
    check_probe(given, rewrite(original.graph, settings), sizes)
    report.step("trace", original.check_lane(settings))
    # The bundled probe of a lane needs no calibration.
    shipped = partial(bundled.read, source.name, calibration=options.calibration, regularization=options.regularization)
    if given is None and (options.finds_layers() or shipped(settings) is None):
        told = fingerprint(
            source, prompts, batch_size=options.batch_size, lane_tokens=settings.tokens, **running_as(original)
        )
        work.open(told, discard=options.force, report=report)  # before the weights are loaded
    size, regularization, judged, calibration = options.batch_size, number_of(options.regularization), None, None
    cases: tuple[Case, ...] = ()
    ready: Fitted | None = None
    with original.loaded(prompts, report) if prompts else nullcontext():
        if options.finds_layers():
            look = partial(
                original.survey, work=work, report=report, batch_size=size, regularization=regularization,
                tokens=settings.tokens,
            )  # fmt: skip
            settings, layers_from, judged = choose_layers(look, original.graph, prompts, settings, options, report)
        if given is None:
            fitted = ready = shipped(settings)
            if fitted is None:
                found = original.features(settings, prompts, work, report, batch_size=size)
                fitted = original.fit(settings, found, prompts, regularization)
            calibration = choose_threshold(fitted, prompts, options, report, judged)
        probe = given if calibration is None else calibration.probe
        assert probe is not None
        if options.verify == "full":
            scores = None if calibration is None else calibration.final
            cases = tuple(expect(original.asking(settings), probe, prompts, scores))
            if ready is not None:  # a shipped probe's scores were computed in bfloat16
                cases = tuple(replace(case, calibrated=None) for case in cases)
    graph, pair = rewrite(original.graph, settings), settings.pair
    lane = "no second lane" if pair is None else f"second lane from block {pair[0] + 1}"
    report.step("rewrite", f"{lane}, threshold {probe.threshold:.4f}")
    gate = GateSpec(
        settings.safety_layer, settings.semantic_layer, layers_from, settings.epsilon, probe.threshold,
        gate=options.gate, known=known(cases), graph=graph.to_json(), **described, **original.more,
    )  # fmt: skip
    device = "auto" if original.device == SPREAD else original.device
    return Patch(options.out, source, graph, gate, probe, calibration, cases, original.dtype, device)


def finish(original: Original, written: Written, options: Options, report: Silent) -> None:
    """Verify a written directory in a fresh process, and add its card and manifest. Raise VerifyError where a check
    fails."""
    patch, directory, digests = written
    graphs = patch.gate.graphs is not None
    calibration = patch.calibration if graphs else None
    if graphs and patch.cases and calibration is not None:
        report.step("verify", "the graphs judge calibration prompts again")
    checks = check_written(directory, device=patch.device, only_files=not patch.cases, calibration=calibration)
    checks += original.more_checks(written)
    if graphs and patch.cases and calibration is None:
        said = "not checked, since the probe was given (--probe), so there are no calibration prompts"
        checks.append(Check("verdicts hold over the calibration prompts", None, said))
    all_passed(checks, report)
    entries: dict[str, Any] = {
        "options": options.to_json(),
        "commit": patch.source.commit,
        "layers_from": patch.gate.layers_from,
    }
    if graphs:
        write_onnx_card(patch, checks, options, directory)
        entries |= made_with()
    else:
        write_card(patch, checks, options.verify, directory)
        entries["operator"] = patch.gate.operator
    write_manifest(directory, digests, **entries)


def needed_disk(source: Source, options: Options) -> int:
    """Return the largest disk use of an export in bytes."""
    needed = SPARE_BYTES + (0 if options.link or options.format == "onnx" else source.weight_bytes())
    if options.format != "safetensors":
        needed += SPARE_BYTES + needed_bytes(source, options.onnx_dtype)
    return needed


def lane_of(original: Original, options: Options, report: Silent) -> tuple[LaneSettings, str]:
    """Return the settings of the second lane, and a text that says where its layers come from."""
    source, sizes = original.source, original.sizes
    given = [layer if isinstance(layer, int) else None for layer in (options.safety_layer, options.semantic_layer)]
    safety: int | None
    semantic: int | None
    safety, semantic, layers_from = layers_of(source, sizes.blocks, sizes.hidden, *given)
    if options.projection == "none":
        safety = semantic = None
        layers_from = "none: made without projection"
    elif options.finds_layers():
        safety, semantic = possible(default_pairs(sizes.blocks, *given), original.graph.earliest_safety_layer())[0]
    elif None in given and source.family.known_layers(sizes.blocks, sizes.hidden) is None:
        report.warn(f"safety layer {safety} and semantic layer {semantic} are {layers_from}.")
    return LaneSettings(safety, semantic, softcap=sizes.softcap, tokens=options.lane_tokens), layers_from


def choose_threshold(
    fitted: Fitted, prompts: Sequence[Prompt], options: Options, report: Silent, judged: Sequence[int] | None
) -> Calibration:
    """Return the probe with its threshold and figures, from `with_threshold`, and report the figures."""
    found = with_threshold(
        fitted, prompts, max_false_positive_rate=options.max_false_positive_rate, threshold=options.threshold,
        judged=judged,
    )  # fmt: skip
    overall = next(figure for figure in found.figures if figure.part == "all")  # the new probe comes first
    report.step(
        "calibrate",
        f"{len(prompts)} prompts: AUC {overall.auc:.3f}, {overall.recall:.1%} of the harmful caught, "
        f"{overall.false_positive_rate:.1%} of the ordinary ones refused (cross-validated)",
    )
    report.step("", verdict_on_projection(found.figures))
    for warning in found.warnings():
        report.warn(warning)
    return found
