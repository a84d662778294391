"""The way through a locate run: open -> trace -> run both lanes -> figures -> proposal -> report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sasa_export.files import check_apart, staged
from sasa_export.flags import check_values
from sasa_export.foreign.opened import holds_graphs, open_graphs
from sasa_export.graph import LayerGraph
from sasa_export.graph.rewrite import LaneSettings
from sasa_export.graph.trace import trace_source
from sasa_export.layers.pairs import Pair, default_pairs, parse_pairs, possible
from sasa_export.layers.prompts import limited
from sasa_export.layers.propose import propose
from sasa_export.layers.survey import Evidence, survey
from sasa_export.layers.sweep import held_out
from sasa_export.manifest import write_manifest
from sasa_export.models import Source, open_source
from sasa_export.models.load import Sizes, load_processor, read_sizes, running
from sasa_export.models.quantized import check_scheme
from sasa_export.options import check_for_graphs
from sasa_export.probe.features import load_as_traced
from sasa_export.probe.work import Work, fingerprint, resumable
from sasa_export.prompts import Prompt, calibration_prompts, for_model
from sasa_export.prompts.shares import counts
from sasa_export.report import Silent
from sasa_export.research.locate.page import Located, write_report
from sasa_export.research.options import LocateOptions
from sasa_export.research.report import SPARE_BYTES, last_name, made_with
from sasa_export.workers import workers

if TYPE_CHECKING:
    from sasa_export.foreign.decoder import Decoder


@dataclass(frozen=True)
class Study:
    """What a run works on, found before any weights are loaded."""

    source: Source
    sizes: Sizes
    graph: LayerGraph
    processor: Any
    prompts: list[Prompt]
    pairs: list[Pair]  # that are swept
    known: Pair | None  # what the family's file says
    dtype: str
    device: str
    decoder: Decoder | None  # of a directory of ONNX graphs


def locate(options: LocateOptions, report: Silent | None = None) -> Located | None:
    """Find where a model perceives danger, understands and speaks, and propose its layers.

    The report is written to `options.out`; what an interrupted run has finished lies beside it, and the next run of the
    same command goes on from there. Several processes share the work (`sasa_export.workers`); all but the first return
    None. Raises SasaExportError; then no report is written.
    """
    check_values(options)
    processes = workers()
    report = report if report is not None and processes.leads else Silent()
    with resumable(options.out, force=options.force, report=report) as work:
        study = _study(options, report)
        report.step("open", f"{study.source.name}: family {study.source.family.name}, {study.sizes.blocks} blocks")
        running = {"dtype": study.dtype, "device": study.device.partition(":")[0]}
        told = fingerprint(study.source, study.prompts, batch_size=options.batch_size, **running)
        work.open(told, discard=options.force, report=report)
        evidence = _measure(study, options, work, report)
        if evidence is None:
            return None
        proposal, prompts = propose(evidence), study.prompts
        subject = {
            "model": last_name(study.source.name),
            "family": study.source.family.name,
            "blocks": study.sizes.blocks,
            "hidden": study.sizes.hidden,
            **running,
            **counts(prompts),
            "source": ", ".join(sorted({prompt.source or "unnamed" for prompt in prompts})),
            "made_with": made_with("locate", options),
        }
        candidates = proposal.candidates if proposal.pair in proposal.candidates else tuple(evidence.sweep.pairs)
        worth = held_out(evidence.sweep, candidates, prompts)
        located = Located(subject, evidence, proposal, study.known, worth)
        with staged(options.out, force=options.force, needed_bytes=SPARE_BYTES) as staging:
            write_report(located, staging)
            write_manifest(staging, {})
    report.step("propose", f"safety layer {proposal.safety_layer}, semantic layer {proposal.semantic_layer}")
    report.step("done", f"{options.out / 'report.html'}")
    return located


def _study(options: LocateOptions, report: Silent) -> Study:
    """Everything that can be wrong before the work begins."""
    prompts, decoder = calibration_prompts(options.calibration, report), None
    if options.onnx_file or holds_graphs(options.model):
        from sasa_export.foreign.decoder import open_decoder

        check_for_graphs(options)
        decoder = open_decoder(open_graphs(options.model, options.onnx_file))
        source, sizes, processor, graph = decoder.graphs.source, decoder.sizes, decoder.processor, decoder.main
        prompts, dtype, device = decoder.readable(prompts, report), decoder.dtype, "cpu"
    else:
        source = open_source(options.model, options.revision, check_scheme)
        sizes, processor = read_sizes(source), load_processor(source)
        dtype, device = running(source, options.dtype, workers().device(options.device))
        graph = trace_source(source, processor)
    check_apart(options.out, source.directory)
    entry = source.family.known_layers(sizes.blocks, sizes.hidden)
    known = None if entry is None else (entry.safety, entry.semantic)
    prompts = limited(for_model(prompts, processor), options.limit)
    if options.pairs is None:
        pairs = sorted({*default_pairs(sizes.blocks), *([] if known is None else [known])})
    else:
        pairs = parse_pairs(options.pairs, sizes.blocks)
    pairs = possible(pairs, graph.earliest_safety_layer())
    return Study(source, sizes, graph, processor, prompts, pairs, known, dtype, device, decoder)


def _measure(study: Study, options: LocateOptions, work: Work, report: Silent) -> Evidence | None:
    """Load the model and survey its blocks; all processes but the first get None."""
    prompts, pairs, size = study.prompts, study.pairs, options.batch_size
    if study.decoder is not None:
        from sasa_export.foreign.survey import survey_graphs

        return survey_graphs(study.decoder, prompts, pairs, work, report, batch_size=size)
    report.step("load", f"{study.dtype} on {study.device}")
    model = load_as_traced(study.source, study.processor, study.graph, prompts, dtype=study.dtype, device=study.device)
    settings = LaneSettings(None, None, softcap=study.sizes.softcap)
    return survey(model, study.processor, study.graph, prompts, pairs, settings, work, report, batch_size=size)
