"""The walk of an evaluation: open -> features of the original -> both models' answers -> figures -> report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from sasa_export.errors import EvaluateError, LocateError
from sasa_export.files import check_free, claimed, staged
from sasa_export.models.load import head_weight, load_model
from sasa_export.probe.features import batches, reading
from sasa_export.probe.fit import head_metric, in_metric
from sasa_export.prompts.prompt import Prompt
from sasa_export.report import Silent
from sasa_export.research.evaluate.arms import Answers
from sasa_export.research.evaluate.depth import depths_of
from sasa_export.research.evaluate.judge import load_judge
from sasa_export.research.evaluate.measure import Evaluated, Features, measure
from sasa_export.research.evaluate.options import EvaluateOptions
from sasa_export.research.evaluate.page import write_report
from sasa_export.research.evaluate.subject import Subject, open_subject
from sasa_export.research.evaluate.timing import choose, timed
from sasa_export.research.work import Work
from sasa_export.workers import Workers, workers

SPARE_BYTES = 20_000_000  # pictures, tables and answers

Model = Callable[[], Any]  # loads the model when it is first asked for
Arrays = dict[str, np.ndarray]


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
            found = _evaluate(options, Batched(Work.beside(options.out), team, report))
            team.wait()
            return found
        except LocateError as error:  # of the work folder, which both commands use
            raise EvaluateError(str(error)) from None


def _evaluate(options: EvaluateOptions, batched: Batched) -> Evaluated | None:
    work, team, report = batched.work, batched.workers, batched.report
    check_free(options.out, force=options.force)
    judge = None if options.judge is None else load_judge(options.judge)
    subject = open_subject(options, team, report)
    if team.leads and work.open(subject.fingerprint(), discard=options.force):
        report.step("resume", "results of an interrupted run are there already")
    team.wait()
    work.folder.mkdir(parents=True, exist_ok=True)  # on a machine of its own

    plain, patched = cache(lambda: _plain(subject)), cache(lambda: _patched(subject))
    features = _features(subject, plain, batched)
    answers = {"plain": _answers(subject, plain, "plain", batched)}
    if not (team.leads and options.timing):
        plain.cache_clear()
    answers["patched"] = _answers(subject, patched, "patched", batched)
    if not team.leads:
        return None
    refused = answers["patched"].scores >= subject.sasa["threshold"]  # (prompts,)
    chosen = choose(subject.evaluation, refused, options.timing)
    with report.bar(len(chosen), "timing") as advance:
        timing = timed(plain, patched, chosen, advance)
    plain.cache_clear()
    patched.cache_clear()
    report.step("measure", "fitting the arms, drawing intervals")
    found = measure(subject, answers, features, timing, judge)
    with staged(options.out, force=options.force, needed_bytes=SPARE_BYTES) as staging:
        write_report(found, staging)
    work.remove()
    for target in found.targets:
        report.check(target.met, target.name, str(target))
    report.step("done", f"{options.out / 'report.md'}")
    return found


@dataclass(frozen=True)
class Batched:
    """Computes over all prompts batch by batch, resumable from a work folder and shared among processes."""

    work: Work
    workers: Workers
    report: Silent

    def __call__(
        self,
        compute: Callable[[list[Prompt]], Arrays],
        names: Sequence[str],
        prompts: Sequence[Prompt],
        batch_size: int,
        kind: str,
    ) -> Arrays:
        """Arrays (prompts, ...) in the prompts' order, in every process.

        Args:
            compute: from a batch of prompts to arrays (rows, ...), of which `names` are kept.
            kind: names this computation in the work folder; what is there already is not computed again.
        """
        rows = list(batches(prompts, batch_size))

        def run(number: int) -> Arrays:
            files = {name: f"{kind}-{number:05d}-{name}" for name in names}
            if not all(self.work.has(file) for file in files.values()):
                found = compute([prompts[row] for row in rows[number]])
                for name, file in files.items():
                    self.work.put(file, found[name])
            return {name: np.array(self.work.get(file)) for name, file in files.items()}

        with self.report.bar(len(prompts), kind) as advance:
            parts = self.workers.spread(range(len(rows)), run, lambda number: advance(len(rows[number])))
        order = np.argsort([row for batch in rows for row in batch])  # (prompts,)
        return {name: np.concatenate([part[name] for part in parts])[order] for name in names}


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


def _features(subject: Subject, plain: Model, batched: Batched) -> dict[str, Features]:
    """What probes read of the original, for the calibration and the evaluation prompts, in the head's metric."""
    nodes = list(depths_of(subject.lane).values()) if subject.options.depth_curve else []

    def compute(prompts: list[Prompt]) -> Arrays:
        with reading(plain().model, subject.processor, subject.lane, nodes) as read:
            found = read(prompts, range(len(prompts)))
        return {"plain": found.plain, "projected": found.projected, **found.more}

    names, size = ["plain", "projected", *nodes], subject.options.batch_size
    features = {
        kind: batched(compute, names, prompts, size, kind)
        for kind, prompts in (("calibration", subject.calibration), ("evaluation", subject.evaluation))
    }
    if not batched.workers.leads:
        return {}
    # Where something non-linear follows the head, probes see logits, which are measured as they are.
    metric = None if subject.lane.of("lane_head") else head_metric(head_weight(plain().model))
    return {kind: {name: in_metric(of, metric) for name, of in found.items()} for kind, found in features.items()}


def _answers(subject: Subject, model: Model, kind: str, batched: Batched) -> Answers:
    """The answers of a "plain" or a "patched" model. EvaluateError where a patched one gives no verdict."""

    def compute(prompts: list[Prompt]) -> Arrays:
        found = model().answers(prompts)
        if kind == "patched" and np.isnan(found["scores"]).any():
            raise EvaluateError("the patched model gives no verdict on some prompts. Export it again.")
        return found

    names = ["tokens"] if kind == "plain" else ["tokens", "scores"]
    found = batched(compute, names, subject.evaluation, subject.batch_size, kind)
    said = [row[row >= 0].tolist() for row in found["tokens"]]
    texts = subject.processor.tokenizer.batch_decode(said, skip_special_tokens=True)
    return Answers(found["tokens"], texts, found.get("scores", np.full(len(texts), np.nan)))
