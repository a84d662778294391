"""The way through an evaluation: open -> features of the original -> both models' answers -> figures -> report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from sasa_export.errors import EvaluateError
from sasa_export.files import staged
from sasa_export.flags import check_values
from sasa_export.manifest import write_manifest
from sasa_export.models.load import head_weight, load_model
from sasa_export.probe.features import reading
from sasa_export.probe.fit import head_metric
from sasa_export.probe.work import Results, Work, resumable
from sasa_export.prompts.prompt import Prompt
from sasa_export.report import Silent
from sasa_export.research.evaluate.arms import Answers
from sasa_export.research.evaluate.fitted import Features, depths_of
from sasa_export.research.evaluate.judge import load_judge
from sasa_export.research.evaluate.measure import Evaluated, measure
from sasa_export.research.evaluate.models import OnnxModel, TorchModel, load_patched
from sasa_export.research.evaluate.options import EvaluateOptions
from sasa_export.research.evaluate.page import write_report
from sasa_export.research.evaluate.subject import Subject, open_subject
from sasa_export.research.evaluate.timing import choose, timed
from sasa_export.research.report import SPARE_BYTES
from sasa_export.verify.onnx import dtype_of
from sasa_export.workers import workers

Model = Callable[[], Any]  # loads the model when it is first asked for
Arrays = Iterator[tuple[str, np.ndarray]]


def evaluate(options: EvaluateOptions, report: Silent | None = None) -> Evaluated | None:
    """Evaluate a patched model against its original, and write the report to `options.out`.

    What an interrupted run has finished lies beside `options.out`, and the next run of the same command goes on from
    there. Several processes share the work (`sasa_export.workers`); all but the first return None. Raises
    SasaExportError; then no report is written.
    """
    check_values(options)
    processes = workers()
    report = report if report is not None and processes.leads else Silent()
    with resumable(options.out, force=options.force, report=report) as work:
        judge = None if options.judge is None else load_judge(options.judge)
        subject = open_subject(options, report)
        work.open(subject.fingerprint(), discard=options.force, report=report)
        plain, patched = cache(lambda: _plain(subject)), cache(lambda: _patched(subject, options.model))
        features = _features(subject, plain, work, report)
        metric = _metric(subject, plain) if "calibration" in features else None
        answers = {"plain": _answers(subject, plain, "plain", work, report)}
        if not (processes.leads and options.timing):
            plain.cache_clear()
        if options.against is not None:  # out of memory again behind this
            other = partial(_patched, subject, options.against)
            answers["against"] = _answers(subject, cache(other), "against", work, report)
        answers["patched"] = _answers(subject, patched, "patched", work, report)
        if not processes.leads:
            return None
        refused = answers["patched"].scores >= subject.sasa["threshold"]  # (prompts,)
        chosen = choose(subject.evaluation, refused, options.timing)
        with report.bar(len(chosen), "timing") as advance:
            timing = timed(plain, patched, chosen, advance)
        plain.cache_clear()
        patched.cache_clear()
        report.step("measure", "fitting the arms, drawing intervals")
        found = measure(subject, answers, features, metric, timing, judge)
        with staged(options.out, force=options.force, needed_bytes=SPARE_BYTES) as staging:
            write_report(found, staging)
            write_manifest(staging, {})
    said = found.arms["patched"]
    report.step("", f"attack success {said['attack']}, over-refusal {said['over_refusal']}, AUC {said['auc']}")
    report.step("done", f"{options.out / 'report.html'}")
    return found


def _plain(subject: Subject) -> TorchModel:
    model = load_model(subject.source, dtype=subject.dtype, device=subject.device)
    return TorchModel(model, subject.processor, subject.options.max_new_tokens)


def _patched(subject: Subject, directory: Path) -> TorchModel | OnnxModel:
    graphs, tokens = dtype_of(directory), subject.options.max_new_tokens
    if graphs is not None:
        return OnnxModel(directory, graphs, subject.device, tokens)
    return TorchModel(*load_patched(directory, subject.dtype, subject.device), tokens)


def _features(subject: Subject, plain: Model, work: Work, report: Silent) -> dict[str, Features]:
    """What probes read of the original, for the evaluation prompts, and the calibration's if a probe is fitted."""
    nodes = list(depths_of(subject.lane).values()) if subject.options.depth_curve else []

    def compute(prompts: list[Prompt], missing: list[str]) -> Arrays:
        with reading(plain().model, subject.processor, subject.lane, nodes) as read:
            found = read(prompts, range(len(prompts)))
        arrays = {"plain": found.plain, "projected": found.projected, **found.more}
        yield from ((name, arrays[name]) for name in missing)

    names, size = ["plain", "projected", *nodes], subject.options.batch_size
    asked = {"evaluation": subject.evaluation}
    if subject.bundled is None or nodes:
        asked["calibration"] = subject.calibration
    sets = {kind: Results(work, kind, prompts, size) for kind, prompts in asked.items()}
    for results in sets.values():
        results.fill(names, compute, report)
    if not workers().leads:
        return {}
    return {kind: {name: results.read(name) for name in names} for kind, results in sets.items()}


def _metric(subject: Subject, plain: Model) -> np.ndarray | None:
    """The head's metric; None where something non-linear follows the head, so that probes see logits as they are."""
    return None if subject.lane.of("lane_head") else head_metric(head_weight(plain().model))


def _answers(subject: Subject, model: Model, kind: str, work: Work, report: Silent) -> Answers:
    """The answers of a "plain" or a patched model. EvaluateError where a patched one gives no verdict."""

    def compute(prompts: list[Prompt], missing: list[str]) -> Arrays:
        found = model().answers(prompts)
        if kind != "plain" and np.isnan(found["scores"]).any():
            raise EvaluateError("the patched model gives no verdict on some prompts. Export it again.")
        yield from ((name, found[name]) for name in missing)

    results = Results(work, kind, subject.evaluation, subject.batch_size)
    results.fill(["tokens"] if kind == "plain" else ["tokens", "scores"], compute, report)
    tokens = results.read("tokens")  # (prompts, longest)
    said = [row[row >= 0].tolist() for row in tokens]
    texts = subject.processor.tokenizer.batch_decode(said, skip_special_tokens=True)
    return Answers(tokens, texts, None if kind == "plain" else results.read("scores"))
