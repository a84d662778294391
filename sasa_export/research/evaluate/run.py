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
from sasa_export.probe.fit import head_metric
from sasa_export.prompts.prompt import Prompt
from sasa_export.report import Silent
from sasa_export.research.evaluate.arms import Answers
from sasa_export.research.evaluate.batched import batched
from sasa_export.research.evaluate.judge import load_judge
from sasa_export.research.evaluate.measure import Evaluated, Features, measure
from sasa_export.research.evaluate.options import EvaluateOptions
from sasa_export.research.evaluate.page import write_report
from sasa_export.research.evaluate.setting import Setting, open_setting
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
    setting = open_setting(options, team, report)
    work = Work.beside(options.out)
    if team.leads and work.open(setting.fingerprint(), discard=options.force):
        report.step("resume", "results of an interrupted run are there already")
    team.wait()
    work.folder.mkdir(parents=True, exist_ok=True)  # on a machine of its own

    plain, patched = cache(lambda: _plain(setting)), cache(lambda: _patched(setting))
    features = _features(setting, plain, work, team, report)
    # Where something non-linear follows the head, probes see logits, which have no metric.
    metric = None if setting.lane.of("lane_head") or not team.leads else head_metric(head_weight(plain().model))
    answers = {"plain": _answers(setting, plain, "plain", work, team, report)}
    if not (team.leads and options.timing):
        plain.cache_clear()
    answers["patched"] = _answers(setting, patched, "patched", work, team, report)
    if not team.leads:
        team.wait()
        return None
    timing = _timing(setting, plain, patched, answers["patched"], report)
    plain.cache_clear()
    patched.cache_clear()
    report.step("measure", "fitting the arms, drawing intervals")
    found = measure(setting, answers, features, metric, timing, judge)
    with staged(options.out, force=options.force, needed_bytes=SPARE_BYTES) as staging:
        write_report(found, {key: said.texts for key, said in answers.items()}, staging)
    work.remove()
    for target in found.targets:
        report.check(target.met, target.name, str(target))
    report.step("done", f"{options.out / 'report.md'}")
    team.wait()
    return found


def _plain(setting: Setting) -> Any:
    from sasa_export.research.evaluate.torch_model import TorchModel

    model = load_model(setting.source, dtype=setting.dtype, device=setting.device)
    return TorchModel(model, setting.processor, setting.options.max_new_tokens)


def _patched(setting: Setting) -> Any:
    patched, tokens = setting.patched, setting.options.max_new_tokens
    if patched.graphs is not None:
        from sasa_export.research.evaluate.onnx_model import OnnxModel

        return OnnxModel(patched.directory, patched.graphs, setting.device, tokens)
    from sasa_export.research.evaluate.torch_model import TorchModel, load_patched

    return TorchModel(*load_patched(patched.directory, setting.dtype, setting.device), tokens)


def _features(setting: Setting, plain: Model, work: Work, team: Workers, report: Silent) -> dict[str, Features]:
    """What probes read of the original, for the calibration prompts and the evaluation prompts."""
    nodes = list(setting.depths.values())

    def compute(prompts: list[Prompt]) -> Features:
        with reading(plain().model, setting.processor, setting.lane, nodes) as read:
            found = read(prompts, range(len(prompts)))
        return {"plain": found.plain, "projected": found.projected, **found.more}

    features = {}
    for kind, prompts in (("calibration", setting.calibration), ("evaluation", setting.evaluation)):
        with report.bar(len(prompts), kind) as advance:
            features[kind] = batched(
                compute, ["plain", "projected", *nodes], prompts, setting.options.batch_size, work, kind, team, advance
            )
    return features


def _answers(setting: Setting, model: Model, kind: str, work: Work, team: Workers, report: Silent) -> Answers:
    """The answers of the `kind` of model, "plain" or "patched". EvaluateError where a patched one gives no verdict."""
    prompts = setting.evaluation

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
        found = batched(compute, names, prompts, setting.batch_size, work, kind, team, advance)
    said = [row[row >= 0].tolist() for row in found["tokens"]]
    texts = setting.processor.tokenizer.batch_decode(said, skip_special_tokens=True)
    return Answers(found["tokens"], texts, found.get("scores"))


def _timing(setting: Setting, plain: Model, patched: Model, answers: Answers, report: Silent) -> dict[str, Timing]:
    if not setting.options.timing:
        return {}
    refused = answers.scores >= setting.patched.sasa["threshold"]  # (prompts,)
    chosen = choose(setting.evaluation, refused, setting.options.timing)
    with report.bar(len(chosen), "timing") as advance:
        return timed(plain(), patched(), chosen, advance)
