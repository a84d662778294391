"""Everything that the original model is needed for, so that it can leave memory before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from sasa_export.calibrate import Calibration, calibrate
from sasa_export.calibrate.data import Prompt, builtin
from sasa_export.calibrate.features import encode, place
from sasa_export.calibrate.figure import verdict_on_projection
from sasa_export.calibrate.probe import Probe
from sasa_export.datasets import calibration_prompts, lopsided
from sasa_export.errors import OpenError, TraceError
from sasa_export.graph import LayerGraph
from sasa_export.open import Source
from sasa_export.open.load import SPREAD, load_model
from sasa_export.open.memory import fits
from sasa_export.options import Options
from sasa_export.report import Silent
from sasa_export.rewrite import LaneSettings, rewrite_lane
from sasa_export.trace import trace
from sasa_export.verify.cases import Case, expect

if TYPE_CHECKING:
    from sasa_export.locate.auto import Chosen


@dataclass(frozen=True)
class Measured:
    """What the original model was needed for; it is out of memory again when this is there."""

    probe: Probe
    calibration: Calibration | None
    cases: tuple[Case, ...]
    dtype: str
    device: str
    layers: Chosen | None = None  # where they were left to be found


def measure(
    source: Source,
    processor: Any,
    graph: LayerGraph,
    settings: LaneSettings,
    given: Probe | None,
    options: Options,
    report: Silent,
) -> Measured:
    """Calibrate where no probe is given, and ask the original model what verification compares with."""
    dtype, device = running(source, options)
    if given is not None and options.verify == "files":
        return Measured(given, None, (), dtype, device)
    prompts = _prompts(options, processor)  # before the weights are loaded: data may be wrong
    warning = lopsided(prompts)
    if warning is not None:
        report.warn(warning)
    report.step("load", f"{dtype} on {device}")
    model = load_model(source, dtype=dtype, device=device)
    pictured = next((prompt for prompt in prompts if prompt.image is not None), prompts[0])
    check_traces(graph, trace_loaded(model, processor, source, pictured))
    layers: Chosen | None = None
    if options.finds_layers():
        from sasa_export.locate.auto import choose_layers

        layers = choose_layers(model, processor, graph, prompts, settings, options, report)
        settings = layers.settings
    lane = rewrite_lane(graph, settings)
    if given is None:
        judged = None if layers is None else layers.held_out
        calibration = _calibrate(model, processor, lane, prompts, judged, options, report)
        probe, scores = calibration.probe, calibration.final
    else:
        calibration, probe, scores = None, given, None
    cases: tuple[Case, ...] = ()
    if options.verify == "full":
        cases = tuple(expect(model, processor, lane, probe, prompts, scores))
    return Measured(probe, calibration, cases, dtype, device, layers)


def trace_loaded(model: Any, processor: Any, source: Source, prompt: Prompt) -> LayerGraph:
    """Trace a loaded model on a prompt, with its picture if it has one."""
    return trace(model, source.family, place(encode(processor, [prompt]), model))


def check_traces(expected: LayerGraph, observed: LayerGraph) -> None:
    """Raise TraceError where a picture takes another way through the decoder than a text does."""
    for before, after in zip_longest(expected, observed):
        if (before and (before.name, before.inputs)) != (after and (after.name, after.inputs)):
            node = after or before
            raise TraceError(
                f"{node.name}: with a picture, this model's decoder does not run as without one "
                f"({node.op} behind {', '.join(node.inputs) or 'nothing'}). It cannot be rewritten yet."
            )


def running(source: Source, options: Options) -> tuple[str, str]:
    """The dtype and device to run in; `auto` spreads a model over all there are where one device has no room for it."""
    import torch

    device = options.device
    dtype = options.dtype
    if dtype == "auto":
        stored = source.config.get("dtype") or source.config.get("torch_dtype")
        dtype = str(stored) if str(stored) in ("float32", "bfloat16", "float16") else "float32"
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        device = device if fits(source, dtype, device) else SPREAD
    try:
        if device != SPREAD:
            torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OpenError(f"--device {device} cannot be used here ({str(error).splitlines()[0]}).") from None
    return dtype, device


def _prompts(options: Options, processor: Any) -> list[Prompt]:
    if options.calibration:
        return calibration_prompts(options.calibration)

    def pieces(word: str) -> int:
        return len(processor.tokenizer.encode(f" {word}", add_special_tokens=False))

    return builtin(pieces)


def _calibrate(
    model: Any,
    processor: Any,
    lane: LayerGraph,
    prompts: Sequence[Prompt],
    judged: Sequence[int] | None,
    options: Options,
    report: Silent,
) -> Calibration:
    with report.bar(len(prompts), "calibrate") as advance:
        calibration = calibrate(
            model,
            processor,
            lane,
            prompts,
            batch_size=options.batch_size,
            max_false_positive_rate=options.max_false_positive_rate,
            threshold=options.threshold,
            regularization=options.regularization_value(),
            shares=options.probabilities == "calibrated",
            judged=judged,
            advance=advance,
        )
    overall = next(figure for figure in calibration.figures if figure.channel == "all")  # of the probe that was made
    report.step(
        "calibrate",
        f"{len(prompts)} prompts: AUC {overall.auc:.3f}, {overall.recall:.1%} of the harmful caught, "
        f"{overall.false_positive_rate:.1%} of the harmless over-refused (cross-validated)",
    )
    report.step("", verdict_on_projection(calibration.figures).strip("*"))
    return calibration
