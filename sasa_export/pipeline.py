"""The whole tool on one page: open -> trace -> calibrate -> rewrite -> write -> verify."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sasa_export.errors import EmitError, SasaExportError, VerifyError
from sasa_export.files import check_apart, check_disk, staged
from sasa_export.foreign.opened import holds_graphs, open_graphs
from sasa_export.graph import LayerGraph
from sasa_export.graph.rewrite import LaneSettings, rewrite, rewrite_lane
from sasa_export.graph.trace import trace_source
from sasa_export.layers.auto import choose_layers
from sasa_export.layers.pairs import possible, with_layer
from sasa_export.manifest import check_ours, write_manifest
from sasa_export.models import Source, layers_of, open_source
from sasa_export.models.load import SPREAD, Sizes, load_processor, read_sizes, running
from sasa_export.models.quantized import check_scheme
from sasa_export.options import Options
from sasa_export.probe import Calibration, Fitted, bundled, calibrate, with_threshold
from sasa_export.probe.features import collect_on_disk, load_as_traced
from sasa_export.probe.figures import verdict_on_projection
from sasa_export.probe.fit import Probe
from sasa_export.probe.given import check_probe, read_probe
from sasa_export.probe.work import Work, fingerprint, resumable
from sasa_export.prompts import Prompt, calibration_prompts, for_model, lopsided
from sasa_export.report import Check, Silent
from sasa_export.runtime.settings import OPERATOR
from sasa_export.verify import check_written
from sasa_export.verify.compare import QUANTIZED, ROUNDED
from sasa_export.workers import workers
from sasa_export.writers.card import write_card
from sasa_export.writers.cases import Case, expect, known
from sasa_export.writers.config import refusal_ids, sasa_settings
from sasa_export.writers.directory import Patch, write_directory
from sasa_export.writers.onnx.directory import (
    PACKAGES,
    check_possible,
    write_onnx_card,
    write_onnx_directory,
    write_onnx_manifest,
)
from sasa_export.writers.onnx.memory import needed_bytes

if TYPE_CHECKING:
    from sasa_export.foreign.decoder import Decoder

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


@dataclass(frozen=True)
class Measured:
    """What the original model was needed for; it is out of memory again when this is there."""

    probe: Probe
    calibration: Calibration | None
    cases: tuple[Case, ...]
    dtype: str
    device: str
    settings: LaneSettings
    layers_from: str


@dataclass(frozen=True)
class Patched:
    """A written, verified directory, and what was measured on the way."""

    directory: Path
    graph: LayerGraph
    probe: Probe
    calibration: Calibration | None


def patch(options: Options, report: Silent | None = None) -> Patched:
    """Turn a vision-language model into a guarded one. Raises SasaExportError; then nothing is written.

    Several processes (`sasa_export.workers`) share the calibration, and the first of them writes. An interrupted
    calibration goes on where it stopped (`resumable`).
    """
    team = workers()
    report = report if report is not None and team.leads else Silent()
    options = replace(options, device=team.device(options.device))
    options.check()
    with resumable(options.out, force=options.force, report=report) as work:
        team.wait()  # nobody writes while another still looks
        if options.onnx_file or holds_graphs(options.model):
            return patch_graphs(options, work, report)
        plan = open_and_trace(options, report)
        measured = measure(plan, options, work, report)
        graph = rewrite(plan.graph, measured.settings)
        if team.leads:
            write_and_verify(plan, measured, graph, options, report)
    return Patched(options.out, graph, measured.probe, measured.calibration)


def open_and_trace(options: Options, report: Silent) -> Plan:
    """Everything that can be wrong before the work begins."""
    given = read_probe(options.probe, options.threshold) if options.probe else None
    prompts = [] if given is not None and options.verify == "files" else _prompts(options, report)
    plain = options.format != "safetensors"
    source = open_source(options.model, options.revision, partial(check_scheme, plain=plain))
    check_apart(options.out, source.directory, options.probe, *map(Path, options.calibration))
    if plain:
        check_possible(source, options)
    check_disk(options.out, _needed_disk(source, options))
    report.step("open", f"{source.name}: family {source.family.name}, {source.weight_bytes() / 1e6:,.0f} MB")
    sizes = read_sizes(source)
    processor = load_processor(source)
    refusal_ids(processor, source.directory, options.refusal)  # here already, like the layers below
    graph = trace_source(source, processor)
    settings, layers_from = _layers(source, sizes, graph, options, report)
    full = rewrite(graph, settings)  # here already, so that layers out of range are an error before the work
    report.step("trace", f"{len(graph.of('block'))} blocks as graphs/{source.family.name}.toml says")
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
        safety, semantic = possible(with_layer(sizes.blocks, *given), graph.earliest_safety_layer())[0]
    elif None in given and source.family.known_layers(sizes.blocks, sizes.hidden) is None:
        report.warn(f"safety layer {safety} and semantic layer {semantic} are {layers_from}.")
    return LaneSettings(safety, semantic, softcap=sizes.softcap, probe_block=options.probe_block), layers_from


def measure(plan: Plan, options: Options, work: Work, report: Silent) -> Measured:
    """Calibrate where no probe is given, and ask the original model what verification compares with."""
    settings, layers_from, calibration, scores = plan.settings, plan.layers_from, None, None
    dtype, device = running(plan.source, options.dtype, options.device)
    prompts = plan.prompts
    if not prompts:
        assert plan.given is not None
        return Measured(plan.given, None, (), dtype, device, settings, layers_from)
    _begin(plan, options, work, report, dtype=dtype, device=device.partition(":")[0])
    report.step("load", f"{dtype} on {device}")
    model = load_as_traced(plan.source, plan.processor, plan.graph, prompts, dtype=dtype, device=device)
    held_out = None
    if options.finds_layers():
        found = choose_layers(model, plan.processor, plan.graph, prompts, settings, options, work, report)
        settings, layers_from, held_out = found.settings, found.layers_from, found.held_out
    lane = rewrite_lane(plan.graph, settings)
    if plan.given is None:
        fitted = _shipped(plan, settings, options)
        if fitted is None:
            features = collect_on_disk(
                model, plan.processor, lane, prompts, work, report, batch_size=options.batch_size
            )
            fitted = calibrate(model, lane, features, prompts, options.regularization_value())
        calibration = with_threshold(
            fitted, prompts, max_false_positive_rate=options.max_false_positive_rate,
            threshold=options.threshold, judged=held_out,
        )  # fmt: skip
        _say_figures(calibration, report)
        scores = calibration.final
    probe = plan.given if calibration is None else calibration.probe
    assert probe is not None
    cases: tuple[Case, ...] = ()
    if options.verify == "full":
        cases = tuple(expect(model, plan.processor, lane, probe, prompts, scores))
    return Measured(probe, calibration, cases, dtype, device, settings, layers_from)


def _begin(plan: Plan, options: Options, work: Work, report: Silent, **running: str) -> None:
    """Begin to calibrate, or go on with what an interrupted run has left, before the weights are loaded."""
    shipped = not options.finds_layers() and _shipped(plan, plan.settings, options) is not None
    if plan.given is None and not shipped:
        told = fingerprint(plan.source, plan.prompts, **running, batch_size=str(options.batch_size))
        work.open(told, discard=options.force, report=report)


def _shipped(plan: Plan, settings: LaneSettings, options: Options) -> Fitted | None:
    return bundled.read(plan.source.name, settings, options.calibration, options.regularization)


def _prompts(options: Options, report: Silent) -> list[Prompt]:
    """What is calibrated on, read before the model is opened, which may take minutes."""
    prompts = calibration_prompts(options.calibration, report)
    warning = lopsided(prompts)
    if warning is not None:
        report.warn(warning)
    return prompts


def _say_figures(calibration: Calibration, report: Silent) -> None:
    overall = next(figure for figure in calibration.figures if figure.part == "all")  # of the probe that was made
    report.step(
        "calibrate",
        f"{len(calibration.prompts)} prompts: AUC {overall.auc:.3f}, {overall.recall:.1%} of the harmful caught, "
        f"{overall.false_positive_rate:.1%} of the ordinary ones refused (cross-validated)",
    )
    report.step("", verdict_on_projection(calibration.figures))
    for warning in calibration.warnings():
        report.warn(warning)


def write_and_verify(plan: Plan, measured: Measured, graph: LayerGraph, options: Options, report: Silent) -> None:
    """Write beside `options.out`, verify, and only then show it there."""
    sasa = _sasa(plan, measured, graph, options, report)
    result = Patch(plan.source, graph, sasa, measured.probe, measured.calibration, measured.cases, measured.dtype)
    device = "auto" if measured.device == SPREAD else measured.device  # as transformers calls it
    with staged(options.out, force=options.force, needed_bytes=_needed_disk(plan.source, options)) as staging:
        plain = staging if options.format == "safetensors" else staging / "safetensors"
        plain.mkdir(exist_ok=True)
        _write_safetensors(result, plain, options, device, report)
        if options.format != "safetensors":
            graphs = staging if options.format == "onnx" else staging / "onnx"
            graphs.mkdir(exist_ok=True)
            _write_onnx(result, plain, graphs, options, device, report)
        check_ours(options.out)  # again: the work may have taken hours
    report.step("done", f"{options.out}")


def _sasa(plan: Plan, measured: Measured, graph: LayerGraph, options: Options, report: Silent) -> dict[str, Any]:
    """What config.json says of the gate."""
    pair, threshold = measured.settings.pair, measured.probe.threshold
    lane = "no second lane" if pair is None else f"second lane from block {pair[0] + 1}"
    report.step("rewrite", f"{lane}, threshold {threshold:.4f}")
    return sasa_settings(
        plan.source, plan.processor, graph, measured.settings, layers_from=measured.layers_from, threshold=threshold,
        refusal=options.refusal, gate=options.gate, known=known(measured.cases),
    )  # fmt: skip


def _write_safetensors(patch: Patch, directory: Path, options: Options, device: str, report: Silent) -> None:
    """Write the directory for transformers, and verify it unless graphs alone are wanted, which are made from it."""
    passing = options.format == "onnx"
    with report.bar(patch.source.weight_bytes(), "write") as advance:
        digests = write_directory(patch, directory, link=options.link or passing, advance=advance)
    if passing:
        return
    checks = check_written(directory, device=device, only_files=not patch.cases)
    _all_passed(checks, report)
    write_card(patch, checks, options.verify, directory)
    operator = {name: patch.sasa[name] for name in OPERATOR}  # who may edit these
    write_manifest(
        directory, digests, options=options.to_json(), commit=patch.source.commit,
        layers_from=patch.sasa["layers_from"], operator=operator,
    )  # fmt: skip


def _write_onnx(patch: Patch, plain: Path, directory: Path, options: Options, device: str, report: Silent) -> None:
    """Write the ONNX directory from the one for transformers, which goes where nobody asked for it, and verify it."""
    write_onnx_directory(
        plain, directory, opset=options.opset, dtype=options.onnx_dtype, advance=lambda step: report.step("onnx", step)
    )
    if options.format == "onnx":
        shutil.rmtree(plain)
    if patch.cases and patch.calibration is not None:
        report.step("verify", "the graphs judge calibration prompts again")
    checks = check_written(directory, device=device, only_files=not patch.cases, calibration=patch.calibration)
    if patch.cases and patch.calibration is None:
        said = "not checked, since the probe was given (--probe), so there are no calibration prompts"
        checks.append(Check("verdicts hold over the calibration prompts", None, said))
    _all_passed(checks, report)
    write_onnx_card(patch, checks, options, directory)
    write_onnx_manifest(
        directory, options=options.to_json(), commit=patch.source.commit, layers_from=patch.sasa["layers_from"]
    )


def patch_graphs(options: Options, work: Work, report: Silent) -> Patched:
    """The same with ONNX graphs that others exported: graph in, graph out."""
    options.check_for_graphs()
    try:
        decoder, plan = open_and_trace_graphs(options, report)
        measured = measure_graphs(decoder, plan, options, work, report)
        graph = rewrite(plan.graph, measured.settings)
        if workers().leads:
            write_and_verify_graphs(decoder, plan, measured, graph, options, report)
    except (SasaExportError, OSError):
        raise
    except Exception as error:  # of onnxruntime and the exporter, which fail in as many ways as there are operators
        said = " ".join(str(error).split())[:300]
        raise EmitError(
            f"{options.model} cannot be guarded here ({type(error).__name__}: {said}). Use another model."
        ) from error
    return Patched(options.out, graph, measured.probe, measured.calibration)


def open_and_trace_graphs(options: Options, report: Silent) -> tuple[Decoder, Plan]:
    """Everything that can be wrong before the work begins; the second lane has shown that it is what it should be."""
    from sasa_export.foreign.decoder import open_decoder
    from sasa_export.foreign.features import check_lane

    given = read_probe(options.probe, options.threshold) if options.probe else None
    asked = [] if given is not None and options.verify == "files" else _prompts(options, report)
    decoder = open_decoder(open_graphs(options.model, options.onnx_file))
    source, sizes = decoder.graphs.source, decoder.sizes
    check_apart(options.out, source.directory, options.probe, *map(Path, options.calibration))
    check_disk(options.out, _needed_disk(source, options))
    report.step("open", f"{decoder.graphs.decoder}: {source.weight_bytes() / 1e6:,.0f} MB, cache in {decoder.dtype}")
    prompts = [prompt for prompt in asked if decoder.sees or prompt.image is None]
    if len(prompts) < len(asked):
        report.warn("pictures cannot be run through these graphs here, so it is calibrated on texts alone.")
    refusal_ids(decoder.processor, source.directory, options.refusal)
    settings, layers_from = _layers(source, sizes, decoder.main, options, report)
    rewrite(decoder.main, settings)
    check_probe(given, sizes.hidden if decoder.linear else sizes.vocabulary)
    apart = check_lane(decoder, settings)
    report.step("trace", f"{sizes.blocks} blocks; begun as the main lane, the second one ends {apart:.0e} from it")
    prompts = for_model(prompts, decoder.processor)
    return decoder, Plan(source, sizes, decoder.processor, decoder.main, settings, layers_from, given, prompts)


def measure_graphs(decoder: Decoder, plan: Plan, options: Options, work: Work, report: Silent) -> Measured:
    """Calibrate where no probe is given, on the graphs as they are deployed, and ask them what verification compares
    with."""
    from sasa_export.foreign.features import collect, expect_graphs, fit_graphs, lanes

    probe, calibration = plan.given, None
    cases: tuple[Case, ...] = ()
    reading = lanes(decoder, plan.settings) if plan.prompts else None
    if probe is None and reading is not None:
        if workers().leads:
            told = fingerprint(plan.source, plan.prompts, layers=str(plan.settings.pair))
            work.open(told, discard=options.force, report=report)
        workers().wait()
        found = collect(reading, plan.prompts, work, report, batch_size=options.batch_size)
        calibration = with_threshold(
            fit_graphs(decoder, found, plan.prompts, options.regularization_value()), plan.prompts,
            max_false_positive_rate=options.max_false_positive_rate, threshold=options.threshold,
        )  # fmt: skip
        _say_figures(calibration, report)
        probe = calibration.probe
    assert probe is not None
    if options.verify == "full" and reading is not None and workers().leads:
        scores = None if calibration is None else calibration.final
        cases = tuple(expect_graphs(decoder, reading, probe, plan.prompts, scores))
    return Measured(probe, calibration, cases, decoder.dtype, "cpu", plan.settings, plan.layers_from)


def write_and_verify_graphs(
    decoder: Decoder, plan: Plan, measured: Measured, graph: LayerGraph, options: Options, report: Silent
) -> None:
    """Write beside `options.out`, verify, and only then show it there."""
    from sasa_export.foreign.features import check_pieces
    from sasa_export.foreign.splice import guarded_decoder
    from sasa_export.foreign.written import write_graphs

    sasa = _sasa(plan, measured, graph, options, report)
    sasa |= {"graphs": decoder.graphs.files, "lengths": decoder.lengths, "dtype": decoder.dtype}
    result = Patch(plan.source, graph, sasa, measured.probe, measured.calibration, measured.cases, measured.dtype)
    assert measured.settings.pair is not None
    guarded, ledger = guarded_decoder(decoder, sasa, measured.probe, measured.settings.pair)
    with staged(options.out, force=options.force, needed_bytes=_needed_disk(plan.source, options)) as staging:
        with report.bar(plan.source.weight_bytes(), "write") as advance:
            digests = write_graphs(
                decoder.graphs, guarded, ledger.layers, result, staging, link=options.link, advance=advance
            )
        checks = check_written(staging, only_files=not result.cases, calibration=result.calibration)
        if result.cases:
            opened = bool(sasa["generation_prompt_ids"])
            most = ROUNDED["float32"] if decoder.exact else QUANTIZED
            checks.append(check_pieces(decoder, staging, result.cases, opened, most))
        _all_passed(checks, report)
        write_card(result, checks, options.verify, staging, "foreign_card.md.j2")
        write_manifest(
            staging, digests, packages=PACKAGES, options=options.to_json(), layers_from=sasa["layers_from"],
        )  # fmt: skip
        check_ours(options.out)
    report.step("done", f"{options.out}")


def _all_passed(checks: list[Check], report: Silent) -> None:
    for check in checks:
        report.check(check.passed, check.name, check.detail)
    failed = [check for check in checks if check.passed is False]
    if failed:
        raise VerifyError(
            f"{len(failed)} of {len(checks)} checks failed ({failed[0].name}: {failed[0].detail}), "
            "so nothing was written."
        )


def _needed_disk(source: Source, options: Options) -> int:
    """Bytes of disk below --out, at most. The graphs are made from a copy for transformers, wanted or not."""
    needed = SPARE_BYTES + (0 if options.link else source.weight_bytes())
    if options.format != "safetensors":
        needed += SPARE_BYTES + needed_bytes(source, options.onnx_dtype)
    return needed
