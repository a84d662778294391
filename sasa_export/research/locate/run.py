"""The way through a locate run: open -> trace -> run both lanes -> figures -> proposal -> report."""

from __future__ import annotations

from dataclasses import dataclass

from sasa_export.files import check_apart, staged
from sasa_export.layers.pairs import Pair, default_pairs, parse_pairs, possible
from sasa_export.layers.prompts import limited
from sasa_export.layers.propose import propose
from sasa_export.layers.sweep import held_out
from sasa_export.manifest import write_manifest
from sasa_export.original import Original, open_original
from sasa_export.probe.work import fingerprint, resumable
from sasa_export.prompts import Prompt, calibration_prompts
from sasa_export.prompts.shares import counts
from sasa_export.report import Silent
from sasa_export.research.locate.page import Located, write_report
from sasa_export.research.options import LocateOptions
from sasa_export.research.report import SPARE_BYTES, last_name, made_with
from sasa_export.workers import workers


@dataclass(frozen=True)
class Study:
    """What a run works on, found before any weights are loaded."""

    original: Original
    prompts: list[Prompt]
    pairs: list[Pair]  # that are swept
    known: Pair | None  # what the family's file says


def locate(options: LocateOptions, report: Silent | None = None) -> Located | None:
    """Find where a model perceives danger, understands and speaks, and propose its layers.

    The report is written to `options.out`; what an interrupted run has finished lies beside it, and the next run of the
    same command goes on from there. Several processes share the work (`sasa_export.workers`); all but the first return
    None. Raises SasaExportError; then no report is written.
    """
    processes = workers()
    report = report if report is not None and processes.leads else Silent()
    with resumable(options.out, force=options.force, report=report) as work:
        study = _study(options, report)
        source, sizes = study.original.source, study.original.sizes
        report.step("open", f"{source.name}: family {source.family.name}, {sizes.blocks} blocks")
        running = {"dtype": study.original.dtype, "device": study.original.device.partition(":")[0]}
        told = fingerprint(source, study.prompts, batch_size=options.batch_size, **running)
        work.open(told, discard=options.force, report=report)
        with study.original.loaded(study.prompts, report):
            evidence = study.original.survey(study.prompts, study.pairs, work, report, batch_size=options.batch_size)
        if evidence is None:
            return None
        proposal, prompts = propose(evidence), study.prompts
        subject = {
            "model": last_name(source.name),
            "family": source.family.name,
            "blocks": sizes.blocks,
            "hidden": sizes.hidden,
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
    prompts = calibration_prompts(options.calibration, report)
    original = open_original(options)
    source, sizes = original.source, original.sizes
    check_apart(options.out, source.directory)
    entry = source.family.known_layers(sizes.blocks, sizes.hidden)
    known = None if entry is None else (entry.safety, entry.semantic)
    prompts = limited(original.readable(prompts, report), options.limit)
    if options.pairs is None:
        pairs = sorted({*default_pairs(sizes.blocks), *([] if known is None else [known])})
    else:
        pairs = parse_pairs(options.pairs, sizes.blocks)
    pairs = possible(pairs, original.graph.earliest_safety_layer())
    return Study(original, prompts, pairs, known)
