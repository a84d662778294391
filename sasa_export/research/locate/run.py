"""The stages of a locate run: open -> trace -> run both lanes -> figures -> proposal -> report."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from sasa_export.backends import Original, open_original, running_as
from sasa_export.files import check_apart
from sasa_export.layers.pairs import Pair, default_pairs, parse_pairs, possible
from sasa_export.layers.prompts import limited
from sasa_export.layers.propose import Proposal, propose
from sasa_export.layers.survey import Evidence
from sasa_export.layers.sweep import held_out
from sasa_export.probe.work import fingerprint, resumable
from sasa_export.prompts import calibration_prompts
from sasa_export.prompts.shares import counts
from sasa_export.report import Silent
from sasa_export.research.locate.pictures import depth, sweep_map
from sasa_export.research.options import LocateOptions
from sasa_export.research.report import jsonable, last_name, made_with, write_report
from sasa_export.workers import workers


@dataclass(frozen=True)
class Located:
    """The evidence on all three capabilities, the sweep, and the proposed layers.

    Attributes:
        subject: the model, its settings, the prompts, and the command that makes the report again.
        known: the pair in the family's file, or None.
        held_out: for each half of the groups, the pair chosen on the other half, and its AUC on this half.
    """

    subject: dict[str, Any]
    evidence: Evidence
    proposal: Proposal
    known: Pair | None
    held_out: list[tuple[Pair, float]]

    @property
    def held_out_auc(self) -> float:
        return float(np.mean([auc for _, auc in self.held_out]))


def locate(options: LocateOptions, report: Silent | None = None) -> Located | None:
    """Find the blocks where a model perceives danger, understands and speaks; propose both layers.

    The report is written to `options.out`. The same command resumes an interrupted run, whose finished work lies
    beside it. Several processes (`sasa_export.workers`) share the work; all but the first return None. Where this
    raises SasaExportError, no report is written.
    """
    processes = workers()
    report = report if report is not None and processes.leads else Silent()
    with resumable(options.out, force=options.force, report=report) as work:
        prompts = calibration_prompts(options.calibration, report)
        original = open_original(options)
        source, sizes = original.source, original.sizes
        check_apart(options.out, source.directory)
        prompts = limited(original.readable(prompts, report), options.limit)
        entry = source.family.known_layers(sizes.blocks, sizes.hidden)
        known = None if entry is None else (entry.safety, entry.semantic)
        pairs = _pairs(options, original, known)
        report.step("open", f"{source.name}: family {source.family.name}, {sizes.blocks} blocks")
        size, tokens = options.batch_size, options.lane_tokens
        told = fingerprint(source, prompts, batch_size=size, lane_tokens=tokens, **running_as(original))
        work.open(told, discard=options.force, report=report)
        with original.loaded(prompts, report):
            evidence = original.survey(prompts, pairs, work, report, batch_size=size, tokens=tokens)
        if evidence is None:
            return None
        proposal = propose(evidence)
        subject = {
            "model": last_name(source.name),
            "family": source.family.name,
            "blocks": sizes.blocks,
            "hidden": sizes.hidden,
            **running_as(original),
            **counts(prompts),
            "source": ", ".join(sorted({prompt.source or "unnamed" for prompt in prompts})),
            "made_with": made_with("locate", options),
        }
        candidates = proposal.candidates if proposal.pair in proposal.candidates else tuple(evidence.sweep.pairs)
        located = Located(subject, evidence, proposal, known, held_out(evidence.sweep, candidates, prompts))
        write(located, options)
    report.step("propose", f"safety layer {proposal.safety_layer}, semantic layer {proposal.semantic_layer}")
    report.step("done", f"{options.out / 'report.html'}")
    return located


def _pairs(options: LocateOptions, original: Original, known: Pair | None) -> list[Pair]:
    """Return the pairs of layers that the sweep measures."""
    if options.pairs is None:
        pairs = sorted({*default_pairs(original.sizes.blocks), *([] if known is None else [known])})
    else:
        pairs = parse_pairs(options.pairs, original.sizes.blocks)
    return possible(pairs, original.graph.earliest_safety_layer())


def write(located: Located, options: LocateOptions) -> None:
    """Write report.html, report.md, locate.json and the pictures."""
    evidence, proposal, swept = located.evidence, located.proposal, located.evidence.sweep
    figures = {
        "subject": located.subject,
        "proposal": proposal,
        "known": located.known,
        "held_out": {
            "halves": [{"pair": pair, "auc": auc} for pair, auc in located.held_out],
            "auc": located.held_out_auc,
        },
        "safety_perception": evidence.perception,
        "semantic_understanding": evidence.understanding,
        "linguistic_expression": evidence.expression,
        "sweep": {
            "pairs": [
                {"safety_layer": pair[0], "semantic_layer": pair[1], **jsonable(estimate)}
                for pair, estimate in swept.pairs.items()
            ],
            "without_projection": swept.plain,
        },
    }
    title = f"Where {located.subject['model']} perceives, understands and speaks"
    pictures = {"depth.png": depth(evidence, proposal), "sweep.png": sweep_map(swept.pairs, proposal)}
    write_report(options, "locate", title, figures, pictures, located=located, **vars(located))
