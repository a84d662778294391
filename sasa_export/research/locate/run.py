"""The walk of a locate run: open -> trace -> run both lanes -> ablate heads -> figures -> proposal -> report."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from sasa_export.files import check_apart, check_free, claimed, staged
from sasa_export.graph.trace import check_traces, trace_source
from sasa_export.models import Source, open_source
from sasa_export.models.load import Sizes, load_model, load_processor, read_sizes, running
from sasa_export.probe.features import trace_loaded
from sasa_export.prompts import calibration_prompts
from sasa_export.prompts.prompt import Prompt, builtin
from sasa_export.report import Silent
from sasa_export.research.command_line import command_line
from sasa_export.research.locate.ablation import Heads, run_ablation
from sasa_export.research.locate.family_file import check_family, write_family
from sasa_export.research.locate.fingerprint import fingerprint
from sasa_export.research.locate.heads import HeadScores, head_scores
from sasa_export.research.locate.interval import auc_of
from sasa_export.research.locate.lane import MainLane, watched
from sasa_export.research.locate.options import LocateOptions
from sasa_export.research.locate.page import write_report
from sasa_export.research.locate.pairs import Pair, default_pairs, parse_blocks, parse_pairs
from sasa_export.research.locate.prompts import ablated_on, limited, spaced
from sasa_export.research.locate.propose import Proposal, cheapest, propose
from sasa_export.research.locate.result import Example, HeldOut, Located, Subject
from sasa_export.research.locate.scatter import POINTS, drawn_blocks, points
from sasa_export.research.locate.survey import Survey, Way, run_lanes, survey
from sasa_export.research.locate.sweep import Sweep, halves
from sasa_export.research.locate.work import Work
from sasa_export.workers import Workers, workers

SPARE_BYTES = 20_000_000  # pictures and page


def locate(
    options: LocateOptions, report: Silent | None = None, *, prompts: Sequence[Prompt] | None = None
) -> Located | None:
    """Find where a model perceives danger, understands and speaks, and propose its layers.

    `prompts` stand in for `options.calibration`. The report is written to `options.out`; what an interrupted run has
    finished lies beside it, and the next run of the same command goes on from there. Several processes share the work
    (`sasa_export.workers`); all but the first return None. Raises SasaExportError; then no report is written.
    """
    options.check()
    team = workers()
    report = report if report is not None and team.leads else Silent()
    with claimed(options.out) if team.leads else nullcontext():
        check_free(options.out, force=options.force)
        return _locate(options, report, prompts, team)


def _locate(options: LocateOptions, report: Silent, prompts: Sequence[Prompt] | None, team: Workers) -> Located | None:
    source = open_source(options.model)
    check_apart(options.out, source.directory)
    if options.write_family is not None:
        check_family(options.write_family, source)
    sizes = read_sizes(source)
    pairs, known = _pairs(options, source, sizes.blocks, sizes.hidden)
    blocks = list(range(sizes.blocks)) if options.blocks is None else parse_blocks(options.blocks, sizes.blocks)
    way = Way(tuple(pairs), options.batch_size, options.epsilon, sizes.softcap)
    report.step("open", f"{source.name}: family {source.family.name}, {sizes.blocks} blocks")
    graph = trace_source(source)
    processor = load_processor(source)
    chosen = limited(_prompts(options, processor) if prompts is None else prompts, options.limit)
    dtype, device = running(source, options.dtype, team.device(options.device))
    rows = ablated_on(chosen, options.ablation_prompts) if options.ablation_prompts else {}
    of_run = {"dtype": dtype, "device": device.partition(":")[0], "batch_size": options.batch_size}
    work = Work.beside(options.out)
    with work.kept() if team.leads else nullcontext():
        if team.leads:
            left = work.open(fingerprint(source, chosen, epsilon=options.epsilon, **of_run), discard=options.force)
            if left:
                report.step("resume", f"{left} results of an interrupted run are there already")
        team.wait()
        report.step("load", f"{dtype} on {device}")
        model = load_model(source, dtype=dtype, device=device)
        pictured = next((prompt for prompt in chosen if prompt.image is not None), chosen[0])
        check_traces(graph, trace_loaded(model, processor, source, pictured))
        with watched(model, processor, graph) as lane:
            heads = Heads(lane, options.batch_size) if options.ablation_prompts else None
            passes = run_lanes(lane, chosen, way, work, team, report)
            if heads is not None:
                _ablate(lane, heads, chosen, rows, blocks, work, team, report)
            if not team.leads:
                return None
            found = survey(lane, chosen, passes, way, report)
        scores = None if heads is None else head_scores(work, rows, blocks)
        command = command_line("locate", options) if prompts is None else ""
        subject = _subject(source, sizes, dtype, device, chosen, command)
        located = _located(subject, chosen, found, scores, known, report)
        with staged(options.out, force=options.force, needed_bytes=SPARE_BYTES) as staging:
            write_report(located, staging)
        if options.write_family is not None:
            write_family(options.write_family, source, located)
    work.remove()
    report.step("propose", f"safety layer {located.proposal.safety}, semantic layer {located.proposal.semantic}")
    report.step("done", f"{options.out / 'report.html'}")
    return located


def _pairs(options: LocateOptions, source: Source, blocks: int, hidden: int) -> tuple[list[Pair], Pair | None]:
    """The pairs to sweep, and the one that the family's file knows."""
    entry = source.family.known_layers(blocks, hidden)
    known = None if entry is None else (entry.safety, entry.semantic)
    if options.pairs is None:
        return default_pairs(blocks, known), known
    return parse_pairs(options.pairs, blocks), known


def _prompts(options: LocateOptions, processor: Any) -> list[Prompt]:
    if options.calibration:
        return calibration_prompts(options.calibration)
    return builtin(lambda word: len(processor.tokenizer.encode(f" {word}", add_special_tokens=False)))


def _ablate(
    lane: MainLane,
    heads: Heads,
    prompts: Sequence[Prompt],
    rows: dict[int, list[int]],
    blocks: Sequence[int],
    work: Work,
    team: Workers,
    report: Silent,
) -> None:
    every = sorted(rows[0] + rows[1])
    with report.bar(-(-len(every) // team.count) * len(blocks), "ablate") as advance:
        run_ablation(lane, heads, prompts, every, blocks, work, team, advance)


def _subject(source: Source, sizes: Sizes, dtype: str, device: str, prompts: Sequence[Prompt], command: str) -> Subject:
    harmful = sum(prompt.label for prompt in prompts)
    return Subject(
        Path(source.name).name if Path(source.name).exists() else source.name,
        source.family.name,
        sizes.blocks,
        sizes.hidden,
        dtype,
        device.partition(":")[0],
        harmful,
        len(prompts) - harmful,
        len({prompt.group for prompt in prompts}),
        ", ".join(sorted({prompt.source or "unnamed" for prompt in prompts})),
        command,
    )


def _located(
    subject: Subject,
    prompts: Sequence[Prompt],
    found: Survey,
    heads: HeadScores | None,
    known: Pair | None,
    report: Silent,
) -> Located:
    proposal = propose(found.separability, found.alignment, found.expression, heads, found.sweep)
    chosen = (proposal.safety, proposal.semantic)
    shown = spaced(range(len(prompts)), POINTS)
    tsne = {}
    blocks = drawn_blocks(subject.blocks, chosen)
    with report.bar(len(blocks), "t-SNE") as advance:
        for block in blocks:
            tsne[block] = points(found.lanes.states(block)[shown])
            advance(1)
    return Located(
        subject,
        found.separability,
        found.alignment,
        found.expression,
        heads,
        found.sweep,
        _held_out(found.sweep, proposal, prompts),
        known,
        proposal,
        _example(prompts, found),
        tsne,
        tuple((prompts[row].label, prompts[row].channel) for row in shown),
    )


def _held_out(swept: Sweep, proposal: Proposal, prompts: Sequence[Prompt]) -> HeldOut:
    """What the choice among the candidates is worth on groups that took no part in it."""
    labels = np.array([prompt.label for prompt in prompts])
    groups = np.array([prompt.group for prompt in prompts])
    first, second = halves(prompts)
    chosen = (proposal.safety, proposal.semantic)
    candidates = proposal.candidates if chosen in proposal.candidates else tuple(swept.pairs)  # where it was overruled
    pairs, aucs = [], []
    for chosen_on, judged_on in ((first, second), (second, first)):
        scores = {pair: swept.scores[pair][chosen_on] for pair in candidates}
        estimates = {
            pair: auc_of(found, labels[chosen_on], groups[chosen_on].tolist()) for pair, found in scores.items()
        }
        pair = cheapest(Sweep(estimates, swept.plain, {}).tied(candidates))
        pairs.append(pair)
        judged = swept.scores[pair][judged_on]
        aucs.append(auc_of(judged, labels[judged_on], groups[judged_on].tolist()).value)
    return HeldOut((pairs[0], pairs[1]), (aucs[0], aucs[1]))


def _example(prompts: Sequence[Prompt], found: Survey) -> Example:
    """A harmless picture prompt where there is one: its words may be shown to anyone."""
    order = sorted(range(len(prompts)), key=lambda row: (prompts[row].label, prompts[row].image is None, row))
    row = order[0]
    prompt = prompts[row]
    asked = f'a picture that says "{prompt.question}", with: {prompt.prompt}' if prompt.question else prompt.prompt
    words = tuple(tuple(found.pieces[token] for token in tokens) for tokens in found.words[row])
    return Example(asked, words)
