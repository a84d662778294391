"""The whole tool as one walk through the house: open -> trace -> calibrate -> rewrite -> emit -> verify."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from sasa_export.calibrate import Calibration, calibrate
from sasa_export.calibrate.data import Prompt, builtin, from_jsonl
from sasa_export.calibrate.features import encode, place
from sasa_export.calibrate.given import check_probe, read_probe
from sasa_export.calibrate.probe import Probe
from sasa_export.emit.card import verdict_on_projection, write_card
from sasa_export.emit.config import generation_prompt_ids, refusal_ids, sasa_settings, write_config
from sasa_export.emit.files import copy_files
from sasa_export.emit.manifest import write_manifest
from sasa_export.emit.scores import write_scores
from sasa_export.emit.staging import check_free, staged
from sasa_export.emit.weights import write_weights
from sasa_export.errors import OpenError, TraceError, VerifyError
from sasa_export.graph import LayerGraph
from sasa_export.open import Source, layers_of, open_source
from sasa_export.open.load import load_model, load_processor, read_sizes, skeleton, stock_classes
from sasa_export.options import Options
from sasa_export.report import Silent
from sasa_export.rewrite import LaneSettings, rewrite, rewrite_lane
from sasa_export.verify import Check, check_files, check_model
from sasa_export.verify.cases import Case, expect, write_cases

SPARE_BYTES = 64_000_000  # processor, tokenizer, card, scores and verification pictures


@dataclass(frozen=True)
class Patched:
    """A written, verified directory, and what was measured on the way."""

    directory: Path
    graph: LayerGraph
    probe: Probe
    calibration: Calibration | None


def patch(options: Options, report: Silent | None = None) -> Patched:
    """Turn a vision-language model into a guarded one. Raises SasaExportError; then nothing is written."""
    report = report or Silent()
    options.check()
    check_free(options.out, force=options.force)
    given = read_probe(options.probe, options.threshold) if options.probe else None

    source = open_source(options.model)
    report.step("open", f"{source.name}: family {source.family.name}, {source.weight_bytes() / 1e6:,.0f} MB")
    sizes = read_sizes(source)
    safety, semantic, layers_from = layers_of(
        source, sizes.blocks, sizes.hidden, options.safety_layer, options.semantic_layer
    )
    if "not measured" in layers_from:
        report.warn(f"safety layer {safety} and semantic layer {semantic} are {layers_from}.")

    graph = trace_source(source)
    settings = LaneSettings(safety, semantic, options.epsilon, sizes.softcap)
    full = rewrite(graph, settings)
    report.step("trace", f"{len(graph.of('block'))} blocks as graphs/{source.family.name}.toml says")
    check_probe(given, sizes.vocabulary if full.of("lane_head") else sizes.hidden)

    processor = load_processor(source)
    measured = _measure(source, processor, graph, settings, given, options, report)
    probe = measured.probe
    sasa = sasa_settings(
        full,
        safety_layer=safety,
        semantic_layer=semantic,
        layers_from=layers_from,
        epsilon=options.epsilon,
        threshold=probe.threshold,
        refusal=options.refusal,
        refusal_token_ids=refusal_ids(processor, source.directory, options.refusal),
        generation_prompt_ids=generation_prompt_ids(processor),
    )
    report.step("rewrite", f"second lane from block {safety + 1}, threshold {probe.threshold:.4f}")

    needed = SPARE_BYTES + (0 if options.link else source.weight_bytes())
    with staged(options.out, force=options.force, needed_bytes=needed) as staging:
        with report.bar(source.weight_bytes(), "emit") as advance:
            digests = write_weights(source.shards, probe, staging, link=options.link, advance=advance)
        copy_files(source, staging)
        write_config(source, sasa, stock_classes(source), staging)
        if measured.calibration is not None:
            write_scores(measured.calibration, staging)
        if measured.cases:
            write_cases(measured.cases, staging, measured.dtype)
        checks = _verify(staging, measured, report)
        write_card(source, full, sasa, measured.calibration, checks, options.verify, staging)
        write_manifest(staging, digests, options=options.to_json(), layers_from=layers_from)
    report.step("done", f"{options.out}")
    return Patched(options.out, full, probe, measured.calibration)


@dataclass(frozen=True)
class Measured:
    """What the original model was needed for; it is out of memory again when this is there."""

    probe: Probe
    calibration: Calibration | None
    cases: tuple[Case, ...]
    dtype: str
    device: str


def _measure(
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
    report.step("load", f"{dtype} on {device}")
    model = load_model(source, dtype=dtype, device=device)
    prompts = _prompts(options, processor)
    pictured = next((prompt for prompt in prompts if prompt.image is not None), prompts[0])
    check_traces(graph, trace_loaded(model, processor, source, pictured))
    lane = rewrite_lane(graph, settings)
    if given is None:
        calibration = _calibrate(model, processor, lane, prompts, options, report)
        probe, scores = calibration.probe, calibration.final
        if options.threshold is not None:
            probe = Probe(probe.weight, probe.bias, options.threshold)
    else:
        calibration, probe, scores = None, given, None
    cases: tuple[Case, ...] = ()
    if options.verify == "full":
        cases = tuple(expect(model, processor, lane, probe, prompts, scores))
    return Measured(probe, calibration, cases, dtype, device)


def trace_source(source: Source) -> LayerGraph:
    """Trace a source on fake weights: its shapes alone, in no memory."""
    import torch

    from sasa_export.trace import trace

    with skeleton(source) as model:
        return trace(model, source.family, {"input_ids": torch.ones(1, 5, dtype=torch.long)})


def trace_loaded(model: Any, processor: Any, source: Source, prompt: Prompt) -> LayerGraph:
    """Trace a loaded model on a prompt, with its picture if it has one."""
    from sasa_export.trace import trace

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
    """The dtype and device to run in."""
    import torch

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OpenError(f"--device {device} cannot be used here ({str(error).splitlines()[0]}).") from None
    dtype = options.dtype
    if dtype == "auto":
        stored = source.config.get("dtype") or source.config.get("torch_dtype")
        dtype = str(stored) if str(stored) in ("float32", "bfloat16", "float16") else "float32"
    return dtype, device


def _prompts(options: Options, processor: Any) -> list[Prompt]:
    if options.calibration is not None:
        return from_jsonl(options.calibration)

    def pieces(word: str) -> int:
        return len(processor.tokenizer.encode(f" {word}", add_special_tokens=False))

    return builtin(pieces)


def _calibrate(
    model: Any, processor: Any, lane: LayerGraph, prompts: Sequence[Prompt], options: Options, report: Silent
) -> Calibration:
    with report.bar(len(prompts), "calibrate") as advance:
        calibration = calibrate(
            model,
            processor,
            lane,
            prompts,
            batch_size=options.batch_size,
            max_false_positive_rate=options.max_false_positive_rate,
            regularization=options.regularization_value(),
            advance=advance,
        )
    overall = next(f for f in calibration.figures if (f.feature, f.channel) == ("projected", "all"))
    report.step(
        "calibrate",
        f"{len(prompts)} prompts: AUC {overall.auc:.3f}, {overall.recall:.1%} of the harmful caught, "
        f"{overall.false_positive_rate:.1%} of the harmless over-refused (cross-validated)",
    )
    report.step("", verdict_on_projection(calibration.figures).strip("*"))
    return calibration


def _verify(staging: Path, measured: Measured, report: Silent) -> list[Check]:
    checks = check_files(staging)
    if measured.cases:
        checks += check_model(staging, device=measured.device)
    for check in checks:
        report.check(check.passed, check.name, check.detail)
    failed = [check for check in checks if not check.passed]
    if failed:
        raise VerifyError(
            f"{len(failed)} of {len(checks)} checks failed ({failed[0].name}: {failed[0].detail}), "
            "so nothing was written."
        )
    return checks
