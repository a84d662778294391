"""The walk of an evaluation: open -> features of the original -> both models' answers -> figures -> report."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from sasa_export.errors import EvaluateError
from sasa_export.files import check_apart, check_free, claimed, staged
from sasa_export.graph import LayerGraph
from sasa_export.graph.rewrite import LaneSettings, rewrite_lane
from sasa_export.graph.trace import trace_source
from sasa_export.manifest import MANIFEST
from sasa_export.models import Source, layers_of
from sasa_export.models.load import head_weight, load_model, load_processor, read_sizes, running
from sasa_export.probe.fit import head_metric
from sasa_export.report import Silent
from sasa_export.research.evaluate.answer import Answer, Model, answer_all
from sasa_export.research.evaluate.depth import depths_of
from sasa_export.research.evaluate.features import Features, read_features
from sasa_export.research.evaluate.figures import Measured, assess
from sasa_export.research.evaluate.guarded import Guarded, open_baseline, open_guarded
from sasa_export.research.evaluate.judge import load_judge
from sasa_export.research.evaluate.options import EvaluateOptions
from sasa_export.research.evaluate.page import write_report
from sasa_export.research.evaluate.prompts import Asked, gather
from sasa_export.research.evaluate.result import Evaluated
from sasa_export.research.evaluate.timing import Timing, choose, timed
from sasa_export.research.evaluate.variants import LAST_TOKENS
from sasa_export.research.locate.fingerprint import fingerprint
from sasa_export.research.locate.work import Work
from sasa_export.workers import Workers, workers

SPARE_BYTES = 20_000_000  # pictures, tables and answers

Value = TypeVar("Value")


class Lazy(Generic[Value]):
    """Made when it is first asked for."""

    def __init__(self, make: Callable[[], Value]) -> None:
        self.make = make
        self.value: Value | None = None

    def __call__(self) -> Value:
        if self.value is None:
            self.value = self.make()
        return self.value

    def drop(self) -> None:
        """Let its memory go; it is made anew when it is asked for again."""
        self.value = None


@dataclass(frozen=True)
class Setting:
    """What is evaluated, opened and checked, and how it runs."""

    options: EvaluateOptions
    guarded: Guarded
    source: Source
    processor: Any
    asked: Asked
    lane: LayerGraph
    depths: dict[int, str]  # nodes by block; empty without a depth curve
    dtype: str
    device: str

    @property
    def batch_size(self) -> int:
        """Of the answers, which are compared and so run in the same batches in both models."""
        return self.options.batch_size if self.guarded.graphs is None else 1


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
        return _evaluate(options, team, report)


def _evaluate(options: EvaluateOptions, team: Workers, report: Silent) -> Evaluated | None:
    check_free(options.out, force=options.force)
    judge = None if options.judge is None else load_judge(options.judge)
    setting = _open(options, team, report)
    work = Work.beside(options.out)
    if team.leads:
        left = work.open(_fingerprint(setting), discard=options.force)
        left += len(list(work.folder.glob("*.jsonl")))
        if left:
            report.step("resume", "results of an interrupted run are there already")
    team.wait()
    work.folder.mkdir(parents=True, exist_ok=True)  # on a machine of its own

    plain, patched = Lazy(lambda: _plain(setting)), Lazy(lambda: _patched(setting))
    features = _features(setting, plain, work, team, report)
    metric = _metric(setting, plain) if team.leads else None
    answers = {"plain": _answers(setting, plain, "plain", work, team, report)}
    if not (team.leads and options.timing):
        plain.drop()
    answers["patched"] = _answers(setting, patched, "patched", work, team, report)
    if not team.leads:
        team.wait()
        return None
    timing = _timing(setting, plain, patched, answers["patched"], report)
    plain.drop()
    patched.drop()
    report.step("measure", "fitting the arms, drawing intervals")
    found = assess(
        Measured(setting.guarded, setting.source, setting.asked, answers["plain"], answers["patched"], metric,
                 *features, setting.depths, timing, setting.dtype, setting.device, setting.batch_size),
        options, judge,
    )  # fmt: skip
    with staged(options.out, force=options.force, needed_bytes=SPARE_BYTES) as staging:
        texts = {key: [answer.text for answer in said] for key, said in answers.items()}
        write_report(found, texts, options.to_json(), staging)
    work.remove()
    for target in found.targets:
        report.check(target.met, target.name, target.sentence().partition(": ")[2].replace("**", ""))
    report.step("done", f"{options.out / 'report.md'}")
    team.wait()
    return found


def _open(options: EvaluateOptions, team: Workers, report: Silent) -> Setting:
    guarded = open_guarded(options.model)
    source = open_baseline(guarded, options.baseline)
    check_apart(options.out, guarded.directory, source.directory)
    report.step("open", f"{options.model} ({guarded.format}), made from {source.name}")
    processor = load_processor(source)
    asked = gather(options, guarded, processor)
    harmful = sum(prompt.label for prompt in asked.evaluation)
    report.step("data", f"{harmful} harmful and {len(asked.evaluation) - harmful} harmless prompts")
    dtype, device = running(source, options.dtype, team.device(options.device))
    sasa = guarded.sasa
    sizes = read_sizes(source)
    # One made without projection is compared with what the family's layers would give.
    layers = sasa["safety_layer"], sasa["semantic_layer"]
    safety, semantic = layers_of(source, sizes.blocks, sizes.hidden, *layers)[:2]
    settings = LaneSettings(
        safety, semantic, sasa["epsilon"], sizes.softcap, sasa.get("probe_block"), sasa.get("probe_positions", 1),
        guarded.further_pairs,
    )  # fmt: skip
    if options.depth_curve and guarded.further_pairs:
        raise EvaluateError("--depth-curve draws one second lane, and this model has several. Leave it out.")
    lane = rewrite_lane(trace_source(source), settings)
    depths = depths_of(lane) if options.depth_curve else {}
    return Setting(options, guarded, source, processor, asked, lane, depths, dtype, device)


def _fingerprint(setting: Setting) -> dict[str, Any]:
    """What finished work depends on."""
    options, asked = setting.options, setting.asked
    manifest = (setting.guarded.directory / MANIFEST).read_bytes()
    return fingerprint(
        setting.source,
        [*asked.evaluation, *asked.calibration],
        patched=hashlib.sha256(manifest).hexdigest(),
        dtype=setting.dtype,
        device=setting.device.partition(":")[0],
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
    )


def _plain(setting: Setting) -> Any:
    from sasa_export.research.evaluate.torch_model import TorchModel

    options = setting.options
    model = load_model(setting.source, dtype=setting.dtype, device=setting.device)
    return TorchModel(model, setting.processor, setting.batch_size, options.max_new_tokens)


def _patched(setting: Setting) -> Model:
    guarded, tokens = setting.guarded, setting.options.max_new_tokens
    if guarded.graphs is not None:
        from sasa_export.research.evaluate.onnx_model import OnnxModel

        return OnnxModel(guarded.directory, guarded.graphs, setting.device, tokens)
    from sasa_export.research.evaluate.torch_model import TorchModel, load_guarded

    model, processor = load_guarded(guarded.directory, setting.dtype, setting.device)
    return TorchModel(model, processor, setting.batch_size, tokens)


def _features(
    setting: Setting, plain: Lazy[Any], work: Work, team: Workers, report: Silent
) -> tuple[Features, Features]:
    """Of the calibration prompts, and of the evaluation prompts."""
    asked, found = setting.asked, []
    nodes = list(setting.depths.values())
    guarded = setting.guarded
    # Of one lane, and of one that reads no mean already.
    alone = guarded.sasa.get("probe_positions", 1) == 1 and not guarded.further_pairs
    for kind, prompts in (("calibration", asked.calibration), ("evaluation", asked.evaluation)):
        with report.bar(len(prompts), kind) as advance:
            found.append(
                read_features(
                    lambda: plain().model,
                    setting.processor,
                    setting.lane,
                    prompts,
                    nodes,
                    work,
                    kind,
                    team,
                    batch_size=setting.options.batch_size,
                    recent=LAST_TOKENS if setting.options.variants and alone else 0,
                    advance=advance,
                )
            )
    return found[0], found[1]


def _metric(setting: Setting, plain: Lazy[Any]) -> np.ndarray | None:
    """The head's metric, (hidden, hidden); None where the probe sees capped logits."""
    if setting.lane.of("lane_head"):
        return None
    return head_metric(head_weight(plain().model))


def _answers(setting: Setting, model: Lazy[Any], kind: str, work: Work, team: Workers, report: Silent) -> list[Answer]:
    prompts = setting.asked.evaluation
    with report.bar(len(prompts), kind) as advance:
        return answer_all(model, prompts, setting.batch_size, work.folder, kind, team, advance)


def _timing(
    setting: Setting, plain: Lazy[Any], patched: Lazy[Any], answers: Sequence[Answer], report: Silent
) -> Timing | None:
    count = setting.options.timing
    if not count:
        return None
    threshold = setting.guarded.sasa["threshold"]
    refused = [answer.unsafe_probability is None or not answer.unsafe_probability < threshold for answer in answers]
    chosen = choose(setting.asked.evaluation, refused, count)
    with report.bar(len(chosen), "timing") as advance:
        return timed(plain(), patched(), chosen, advance)
