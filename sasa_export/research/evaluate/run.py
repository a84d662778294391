"""The stages of an evaluation: open -> features and answers of the original -> answers of the patched model -> figures
-> report."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sasa_export.backends import Answering
from sasa_export.errors import EvaluateError
from sasa_export.probe.calibration import Fitted
from sasa_export.probe.features import Features
from sasa_export.probe.work import Results, Work, resumable
from sasa_export.prompts.prompt import Prompt
from sasa_export.report import Silent
from sasa_export.research.evaluate.arms import Answers
from sasa_export.research.evaluate.measure import Evaluated, measure
from sasa_export.research.evaluate.models import load_patched
from sasa_export.research.evaluate.pictures import pictures
from sasa_export.research.evaluate.subject import Subject, open_subject
from sasa_export.research.options import EvaluateOptions
from sasa_export.research.report import write_report
from sasa_export.workers import workers


def evaluate(options: EvaluateOptions, report: Silent | None = None) -> Evaluated | None:
    """Evaluate a patched model against its original, and write the report to `options.out`.

    The same command resumes an interrupted run, whose finished work lies beside `options.out`. Several processes
    (`sasa_export.workers`) share the work; all but the first return None. Where this raises SasaExportError, no report
    is written.
    """
    processes = workers()
    report = report if report is not None and processes.leads else Silent()
    with resumable(options.out, force=options.force, report=report) as work:
        subject = open_subject(options, report)
        work.open(subject.fingerprint(), discard=options.force, report=report)
        # One model at a time is in memory.
        features, fitted, plain = _of_the_original(subject, work, report)
        answers = {"plain": plain}
        if options.against is not None:
            answers["against"] = _patched(subject, options.against, "against", work, report)
        answers["patched"] = _patched(subject, options.model, "patched", work, report)
        if not processes.leads:
            return None
        report.step("measure", "fitting the arms, drawing intervals")
        found = measure(subject, answers, features, fitted)
        _write(found, options)
    said = found.arms["patched"]
    report.step("", f"attack success {said['attack']}, over-refusal {said['over_refusal']}, AUC {said['auc']}")
    report.step("done", f"{options.out / 'report.html'}")
    return found


def _of_the_original(subject: Subject, work: Work, report: Silent) -> tuple[Features, Fitted, Answers]:
    """Return features of the evaluation prompts, probes (fitted if there are none), and the original's answers."""
    fitted, size, original, lane = subject.fitted, subject.options.batch_size, subject.original, subject.lane
    with original.loaded(subject.evaluation, report):
        if fitted is None:
            found = original.features(lane, subject.calibration, work, report, batch_size=size, kind="calibration")
            fitted = original.fit(lane, found, subject.calibration, subject.regularization)
        features = original.features(lane, subject.evaluation, work, report, batch_size=size, kind="evaluation")
        return features, fitted, _answers(subject, original.answering(), "plain", work, report)


def _patched(subject: Subject, directory: Path, kind: str, work: Work, report: Silent) -> Answers:
    model = load_patched(directory, subject.original.dtype, subject.original.device)
    return _answers(subject, model, kind, work, report)


def _answers(subject: Subject, model: Answering, kind: str, work: Work, report: Silent) -> Answers:
    """Return the answers of the "plain" or a patched model. Raise EvaluateError where a gate gives no verdict."""
    gated = kind != "plain"

    def compute(prompts: list[Prompt], missing: list[str]) -> Iterator[tuple[str, np.ndarray]]:
        found = model.answers(prompts, subject.options.max_new_tokens)
        if gated and np.isnan(found["scores"]).any():
            raise EvaluateError("the patched model gives no verdict on some prompts. Export it again.")
        yield from ((name, found[name]) for name in missing)

    results = Results(work, kind, subject.evaluation, subject.batch_size)
    results.fill(["tokens", "scores"] if gated else ["tokens"], compute, report)
    tokens = results.read("tokens")  # (prompts, longest)
    said = [row[row >= 0].tolist() for row in tokens]
    texts = subject.original.processor.tokenizer.batch_decode(said, skip_special_tokens=True)
    return Answers(tokens, texts, results.read("scores") if gated else np.full(len(texts), np.nan))


def _write(found: Evaluated, options: EvaluateOptions) -> None:
    """Write report.html, report.md, evaluate.json, answers.jsonl and the pictures."""
    title = f"{found.subject['model']} against {found.subject['baseline']}"
    figures = {name: value for name, value in vars(found).items() if name != "answers"}
    rows = found.answers.drop(columns=["source", "group"])
    lines = rows.to_json(orient="records", lines=True, force_ascii=False, double_precision=6)
    files = {**pictures(found), "answers.jsonl": lines.encode()}
    write_report(options, "evaluate", title, figures, files, found=found, subject=found.subject, arms=found.arms)
