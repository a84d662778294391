"""The way of `pipeline.py` for ONNX graphs that others exported: graph in, graph out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sasa_export import steps
from sasa_export.errors import EmitError, reworded
from sasa_export.foreign.decoder import Decoder, open_decoder
from sasa_export.foreign.features import ask_graphs, check_lane, check_pieces, collect, fit_graphs, lanes, original
from sasa_export.foreign.opened import open_graphs
from sasa_export.foreign.splice import guarded_decoder
from sasa_export.foreign.survey import survey_graphs
from sasa_export.foreign.written import write_graphs
from sasa_export.layers.auto import choose_layers
from sasa_export.options import Options, check_for_graphs
from sasa_export.probe.work import Work, fingerprint
from sasa_export.report import Silent
from sasa_export.steps import Plan
from sasa_export.verify import check_written
from sasa_export.verify.compare import QUANTIZED, ROUNDED
from sasa_export.writers.card import write_card
from sasa_export.writers.directory import Patch
from sasa_export.writers.onnx.directory import write_onnx_manifest


def patch_graphs(options: Options, work: Work, report: Silent) -> Patch:
    """Turn a directory of graphs into a guarded one. Raises SasaExportError; then nothing is written."""
    check_for_graphs(options)
    # What onnxruntime and the exporter raise, which fail in as many ways as there are operators.
    with reworded(EmitError, f"{options.model} cannot be guarded here ({{reason}}). Use another model."):
        decoder, plan = open_and_trace(options, report)
        patch = measure(decoder, plan, options, work, report)
        return steps.write_and_verify(patch, options, report, partial(_write, decoder))


def open_and_trace(options: Options, report: Silent) -> tuple[Decoder, Plan]:
    """Everything that can be wrong before the work begins; the second lane has shown that it is what it should be."""
    given, prompts = steps.read_inputs(options, report)
    decoder = open_decoder(open_graphs(options.model, options.onnx_file))
    source, sizes = decoder.graphs.source, decoder.sizes
    steps.check_output(source, options)
    report.step("open", f"{decoder.graphs.decoder}: {source.weight_bytes() / 1e6:,.0f} MB, cache in {decoder.dtype}")
    prompts = decoder.readable(prompts, report)
    plan = steps.make_plan(source, sizes, decoder.processor, decoder.main, (given, prompts), options, report)
    apart = check_lane(decoder, plan.settings)
    report.step("trace", f"{sizes.blocks} blocks; begun as the main lane, the second one ends {apart:.0e} from it")
    return decoder, plan


def measure(decoder: Decoder, plan: Plan, options: Options, work: Work, report: Silent) -> Patch:
    """Calibrate where no probe is given, on the graphs as they are deployed, and ask them what verification compares
    with."""
    prompts, calibration, held_out = plan.prompts, None, None
    size, regularization = options.batch_size, options.regularization_value()
    if plan.given is None:
        told = fingerprint(plan.source, prompts, layers=f"{plan.settings.pair} {options.finds_layers()}")
        work.open(told, discard=options.force, report=report)
    if options.finds_layers():
        look = partial(survey_graphs, decoder, work=work, report=report, batch_size=size, regularization=regularization)
        settings, layers_from, held_out = choose_layers(look, plan.graph, prompts, plan.settings, options, report)
        plan = replace(plan, settings=settings, layers_from=layers_from)
    reading: Any = lanes(decoder, plan.settings) if prompts else None
    if plan.given is None:
        fitted = fit_graphs(decoder, collect(reading, prompts, work, report, batch_size=size), prompts, regularization)
        calibration = steps.choose_threshold(fitted, prompts, options, report, held_out)
    ask = partial(ask_graphs, original(decoder), reading) if options.verify == "full" else None
    more = {"graphs": decoder.graphs.files, "lengths": decoder.lengths, "dtype": decoder.dtype}
    return steps.make_patch(plan, calibration, ask, decoder.dtype, "cpu", options, report, more)


def _write(decoder: Decoder, patch: Patch, directory: Path, options: Options, report: Silent) -> None:
    """Write the graphs with the guard in the decoder, and verify them."""
    guarded, ledger = guarded_decoder(decoder, patch.sasa, patch.probe)
    with report.bar(patch.source.weight_bytes(), "write") as advance:
        digests = write_graphs(
            decoder.graphs, guarded, ledger.layers, patch, directory, link=options.link, advance=advance
        )
    checks = check_written(directory, only_files=not patch.cases, calibration=patch.calibration)
    if patch.cases:
        opened = bool(patch.sasa["generation_prompt_ids"])
        most = ROUNDED["float32"] if decoder.exact else QUANTIZED
        checks.append(check_pieces(decoder, directory, patch.cases, opened, most))
    steps.all_passed(checks, report)
    write_card(patch, checks, options.verify, directory, "foreign_card.md.j2")
    write_onnx_manifest(directory, digests, options=options.to_json(), layers_from=patch.sasa["layers_from"])
