"""The walk of an evaluation: open -> features of the original -> both models' answers -> figures -> report."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any

import numpy as np

from sasa_export.errors import EvaluateError, LocateError
from sasa_export.files import check_free, claimed, staged
from sasa_export.models.load import head_weight, load_model
from sasa_export.probe.features import reading
from sasa_export.probe.fit import head_metric, in_metric
from sasa_export.prompts.prompt import Prompt
from sasa_export.report import Silent
from sasa_export.research.evaluate.arms import Answers
from sasa_export.research.evaluate.batched import batched
from sasa_export.research.evaluate.depth import depths_of
from sasa_export.research.evaluate.judge import load_judge
from sasa_export.research.evaluate.measure import Evaluated, Features, measure
from sasa_export.research.evaluate.options import EvaluateOptions
from sasa_export.research.evaluate.page import write_report
from sasa_export.research.evaluate.subject import Subject, open_subject
from sasa_export.research.evaluate.timing import Timing, choose, timed
from sasa_export.research.locate.work import Work
from sasa_export.workers import Workers, workers

SPARE_BYTES = 20_000_000  # pictures, tables and answers

Model = Callable[[], Any]  # loads the model when it is first asked for


def evaluate(options: EvaluateOptions, report: Silent | None = None) -> Evaluated | None:
    """Evaluate a patched model against its original, and write the report to `options.out`.

    What an interrupted run has finished lies beside `options.out`, and the next run of the same command goes on from
    there. Returns None in the processes that do not lead. Raises SasaExportError; then no report is written.
    """
    team = workers()
    report = report if report is not None and team.leads else Silent()
    options.check()
    with ExitStack() as stack:
        if team.leads:
            # The second of two runs on one output is told at once: they would share the unfinished work beside it.
            stack.enter_context(claimed(options.out))
            stack.enter_context(Work.beside(options.out).kept())
        try:
            return _evaluate(options, team, report)
        except LocateError as error:  # of the work folder, which both commands use
            raise EvaluateError(str(error)) from None


def _evaluate(options: EvaluateOptions, team: Workers, report: Silent) -> Evaluated | None:
    check_free(options.out, force=options.force)
    judge = None if options.judge is None else load_judge(options.judge)
    subject = open_subject(options, team, report)
    work = Work.beside(options.out)
    if team.leads and work.open(subject.fingerprint(), discard=options.force):
        report.step("resume", "results of an interrupted run are there already")
    team.wait()
    work.folder.mkdir(parents=True, exist_ok=True)  # on a machine of its own

    plain, patched = cache(lambda: _plain(subject)), cache(lambda: _patched(subject))
    features = _features(subject, plain, work, team, report)
    answers = {"plain": _answers(subject, plain, "plain", work, team, report)}
    if not (team.leads and options.timing):
        plain.cache_clear()
    answers["patched"] = _answers(subject, patched, "patched", work, team, report)
    if not team.leads:
        team.wait()
        return None
    timing = _timing(subject, plain, patched, answers["patched"], report)
    plain.cache_clear()
    patched.cache_clear()
    report.step("measure", "fitting the arms, drawing intervals")
    found = measure(subject, answers, features, timing, judge)
    with staged(options.out, force=options.force, needed_bytes=SPARE_BYTES) as staging:
        write_report(found, {key: said.texts for key, said in answers.items()}, staging)
    work.remove()
    for target in found.targets:
        report.check(target.met, target.name, str(target))
    report.step("done", f"{options.out / 'report.md'}")
    team.wait()
    return found


def _plain(subject: Subject) -> Any:
    from sasa_export.research.evaluate.torch_model import TorchModel

    model = load_model(subject.source, dtype=subject.dtype, device=subject.device)
    return TorchModel(model, subject.processor, subject.options.max_new_tokens)


def _patched(subject: Subject) -> Any:
    directory, tokens = subject.options.model, subject.options.max_new_tokens
    if subject.graphs is not None:
        from sasa_export.research.evaluate.onnx_model import OnnxModel

        return OnnxModel(directory, subject.graphs, subject.device, tokens)
    from sasa_export.research.evaluate.torch_model import TorchModel, load_patched

    return TorchModel(*load_patched(directory, subject.dtype, subject.device), tokens)


def _features(subject: Subject, plain: Model, work: Work, team: Workers, report: Silent) -> dict[str, Features]:
    """What probes read of the original, for the calibration prompts and the evaluation prompts."""
    nodes = list(depths_of(subject.lane).values()) if subject.options.depth_curve else []

    def compute(prompts: list[Prompt]) -> Features:
        with reading(plain().model, subject.processor, subject.lane, nodes) as read:
            found = read(prompts, range(len(prompts)))
        return {"plain": found.plain, "projected": found.projected, **found.more}

    features = {}
    for kind, prompts in (("calibration", subject.calibration), ("evaluation", subject.evaluation)):
        with report.bar(len(prompts), kind) as advance:
            features[kind] = batched(
                compute, ["plain", "projected", *nodes], prompts, subject.options.batch_size, work, kind, team, advance
            )
    if not team.leads:
        return {}
    # Where something non-linear follows the head, probes see logits, which are measured as they are.
    metric = None if subject.lane.of("lane_head") else head_metric(head_weight(plain().model))
    return {
        kind: {name: in_metric(values, metric) for name, values in found.items()} for kind, found in features.items()
    }


def _answers(subject: Subject, model: Model, kind: str, work: Work, team: Workers, report: Silent) -> Answers:
    """The answers of the `kind` of model, "plain" or "patched". EvaluateError where a patched one gives no verdict."""
    prompts = subject.evaluation

    def compute(batch: list[Prompt]) -> dict[str, np.ndarray]:
        found = model().answers(batch)
        silent = np.flatnonzero(np.isnan(found["scores"])) if kind == "patched" else ()
        if len(silent):
            raise EvaluateError(
                f"the patched model gives no verdict on the prompt {batch[silent[0]].name}. Export it again."
            )
        return found

    names = ["tokens"] if kind == "plain" else ["tokens", "scores"]
    with report.bar(len(prompts), kind) as advance:
        found = batched(compute, names, prompts, subject.batch_size, work, kind, team, advance)
    said = [row[row >= 0].tolist() for row in found["tokens"]]
    texts = subject.processor.tokenizer.batch_decode(said, skip_special_tokens=True)
    return Answers(found["tokens"], texts, found.get("scores"))


def _timing(subject: Subject, plain: Model, patched: Model, answers: Answers, report: Silent) -> dict[str, Timing]:
    if not subject.options.timing:
        return {}
    refused = answers.scores >= subject.sasa["threshold"]  # (prompts,)
    chosen = choose(subject.evaluation, refused, subject.options.timing)
    with report.bar(len(chosen), "timing") as advance:
        return timed(plain(), patched(), chosen, advance)
