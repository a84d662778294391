"""The whole tool on one page: open -> trace -> calibrate -> rewrite -> write -> verify.

What it does for torch models is here; `foreign.patch` does the same for ONNX graphs that others exported, and `steps`
holds what both have in common.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

from sasa_export import steps
from sasa_export.foreign.opened import holds_graphs
from sasa_export.graph.rewrite import rewrite_lane
from sasa_export.graph.trace import trace_source
from sasa_export.layers.auto import choose_layers
from sasa_export.layers.survey import survey
from sasa_export.manifest import write_manifest
from sasa_export.models import open_source
from sasa_export.models.load import load_processor, read_sizes, running
from sasa_export.models.quantized import check_scheme
from sasa_export.options import Options
from sasa_export.probe import Fitted, bundled, calibrate
from sasa_export.probe.features import collect_on_disk, load_as_traced
from sasa_export.probe.work import Work, fingerprint, resumable
from sasa_export.report import Check, Silent
from sasa_export.runtime.settings import OPERATOR
from sasa_export.steps import Plan
from sasa_export.verify import check_written
from sasa_export.workers import workers
from sasa_export.writers.card import write_card
from sasa_export.writers.cases import ask
from sasa_export.writers.directory import Patch, write_directory
from sasa_export.writers.onnx.directory import (
    check_possible,
    write_onnx_card,
    write_onnx_directory,
    write_onnx_manifest,
)


def patch(options: Options, report: Silent | None = None) -> Patch:
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
            from sasa_export.foreign.patch import patch_graphs  # a lean installation has no onnx

            return patch_graphs(options, work, report)
        plan = open_and_trace(options, report)
        made = measure(plan, options, work, report)
        return steps.write_and_verify(made, options, report, _write)


def open_and_trace(options: Options, report: Silent) -> Plan:
    """Everything that can be wrong before the work begins."""
    inputs = steps.read_inputs(options, report)
    plain = options.format != "safetensors"
    source = open_source(options.model, options.revision, partial(check_scheme, plain=plain))
    if plain:
        check_possible(source, options)
    steps.check_output(source, options)
    report.step("open", f"{source.name}: family {source.family.name}, {source.weight_bytes() / 1e6:,.0f} MB")
    sizes = read_sizes(source)
    processor = load_processor(source)
    graph = trace_source(source, processor)
    plan = steps.make_plan(source, sizes, processor, graph, inputs, options, report)
    report.step("trace", f"{len(graph.of('block'))} blocks as graphs/{source.family.name}.toml says")
    return plan


def measure(plan: Plan, options: Options, work: Work, report: Silent) -> Patch:
    """Calibrate where no probe is given, and ask the original model what verification compares with."""
    dtype, device = running(plan.source, options.dtype, options.device)
    prompts, calibration, held_out = plan.prompts, None, None
    if not prompts:
        return steps.make_patch(plan, None, None, dtype, device, options, report)
    if plan.given is None and (options.finds_layers() or _shipped(plan, options) is None):
        told = fingerprint(
            plan.source, plan.prompts, dtype=dtype, device=device.partition(":")[0], batch_size=str(options.batch_size)
        )
        work.open(told, discard=options.force, report=report)  # before the weights are loaded
    report.step("load", f"{dtype} on {device}")
    model = load_as_traced(plan.source, plan.processor, plan.graph, prompts, dtype=dtype, device=device)
    size, regularization = options.batch_size, options.regularization_value()
    if options.finds_layers():
        look = partial(
            survey, model, plan.processor, plan.graph, settings=plan.settings, work=work, report=report,
            batch_size=size, regularization=regularization,
        )  # fmt: skip
        settings, layers_from, held_out = choose_layers(look, plan.graph, prompts, plan.settings, options, report)
        plan = replace(plan, settings=settings, layers_from=layers_from)
    lane = rewrite_lane(plan.graph, plan.settings)
    if plan.given is None:
        fitted = _shipped(plan, options)
        if fitted is None:
            features = collect_on_disk(model, plan.processor, lane, prompts, work, report, batch_size=size)
            fitted = calibrate(model, lane, features, prompts, regularization)
        calibration = steps.choose_threshold(fitted, prompts, options, report, held_out)
    asking = partial(ask, model, plan.processor, lane) if options.verify == "full" else None
    return steps.make_patch(plan, calibration, asking, dtype, device, options, report)


def _shipped(plan: Plan, options: Options) -> Fitted | None:
    return bundled.read(plan.source.name, plan.settings, options.calibration, options.regularization)


def _write(patch: Patch, staging: Path, options: Options, report: Silent) -> None:
    """Write and verify the formats that are asked for."""
    plain = staging if options.format == "safetensors" else staging / "safetensors"
    plain.mkdir(exist_ok=True)
    _write_safetensors(patch, plain, options, report)
    if options.format != "safetensors":
        graphs = staging if options.format == "onnx" else staging / "onnx"
        graphs.mkdir(exist_ok=True)
        _write_onnx(patch, plain, graphs, options, report)


def _write_safetensors(patch: Patch, directory: Path, options: Options, report: Silent) -> None:
    """Write the directory for transformers, and verify it unless graphs alone are wanted, which are made from it."""
    passing = options.format == "onnx"
    with report.bar(patch.source.weight_bytes(), "write") as advance:
        digests = write_directory(patch, directory, link=options.link or passing, advance=advance)
    if passing:
        return
    checks = check_written(directory, device=patch.device, only_files=not patch.cases)
    steps.all_passed(checks, report)
    write_card(patch, checks, options.verify, directory)
    operator = {name: patch.sasa[name] for name in OPERATOR}  # who may edit these
    write_manifest(
        directory, digests, options=options.to_json(), commit=patch.source.commit,
        layers_from=patch.sasa["layers_from"], operator=operator,
    )  # fmt: skip


def _write_onnx(patch: Patch, plain: Path, directory: Path, options: Options, report: Silent) -> None:
    """Write the ONNX directory from the one for transformers, which goes where nobody asked for it, and verify it."""
    write_onnx_directory(
        plain, directory, opset=options.opset, dtype=options.onnx_dtype, advance=lambda step: report.step("onnx", step)
    )
    if options.format == "onnx":
        shutil.rmtree(plain)
    if patch.cases and patch.calibration is not None:
        report.step("verify", "the graphs judge calibration prompts again")
    checks = check_written(directory, device=patch.device, only_files=not patch.cases, calibration=patch.calibration)
    if patch.cases and patch.calibration is None:
        said = "not checked, since the probe was given (--probe), so there are no calibration prompts"
        checks.append(Check("verdicts hold over the calibration prompts", None, said))
    steps.all_passed(checks, report)
    write_onnx_card(patch, checks, options, directory)
    write_onnx_manifest(
        directory, {}, options=options.to_json(), commit=patch.source.commit, layers_from=patch.sasa["layers_from"]
    )
