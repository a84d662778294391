"""The whole tool as one walk through the house: open -> trace -> calibrate -> rewrite -> emit -> verify."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sasa_export.calibrate import Calibration, calibrate
from sasa_export.calibrate.data import Prompt, builtin, from_jsonl
from sasa_export.calibrate.fit import Probe
from sasa_export.emit.card import verdict_on_projection, write_card
from sasa_export.emit.config import generation_prompt_ids, refusal_ids, sasa_settings, write_config
from sasa_export.emit.files import copy_files
from sasa_export.emit.manifest import write_manifest
from sasa_export.emit.scores import write_scores
from sasa_export.emit.staging import check_free, staged
from sasa_export.emit.weights import write_weights
from sasa_export.errors import VerifyError
from sasa_export.graph import LayerGraph
from sasa_export.open import Source, layers_of, open_source
from sasa_export.options import Options
from sasa_export.report import Silent
from sasa_export.rewrite import LaneSettings, rewrite, rewrite_lane

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
    safety, semantic, layers_from = layers_of(source, options.safety_layer, options.semantic_layer)
    if "not measured" in layers_from:
        report.warn(f"safety layer {safety} and semantic layer {semantic} are {layers_from}.")

    graph = trace_source(source)
    settings = LaneSettings(safety, semantic, options.epsilon, softcap_of(source))
    full = rewrite(graph, settings)
    report.step("trace", f"{len(graph.of('block'))} blocks as graphs/{source.family.name}.toml says")
    check_probe(given, full, source)

    from sasa_export.open.load import load_model, load_processor, stock_classes

    processor = load_processor(source)
    prompts = _prompts(options, processor)
    lane = rewrite_lane(graph, settings)
    model = None
    if given is None or options.verify == "full":
        dtype, device = running(source, options)
        report.step("load", f"{dtype} on {device}")
        model = load_model(source, dtype=dtype, device=device)
    calibration = None
    if given is None:
        calibration = _calibrate(model, processor, lane, prompts, options, report)
        probe = calibration.probe
        if options.threshold is not None:
            probe = Probe(probe.weight, probe.bias, options.threshold)
    else:
        probe = given

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
        if calibration is not None:
            write_scores(calibration, staging)
        checks = _verify(staging, model, processor, lane, probe, prompts, calibration, options, report)
        write_card(source, full, sasa, calibration, checks, options.verify, staging)
        write_manifest(staging, digests, options=options.to_json(), layers_from=layers_from)
    report.step("done", f"{options.out}")
    return Patched(options.out, full, probe, calibration)


def trace_source(source: Source) -> LayerGraph:
    """Trace a source on fake weights: its shapes alone, in no memory."""
    import torch

    from sasa_export.open.load import skeleton
    from sasa_export.trace import trace

    with skeleton(source) as model:
        return trace(model, source.family, {"input_ids": torch.ones(1, 5, dtype=torch.long)})


def softcap_of(source: Source) -> float | None:
    """The soft cap on logits that the configuration names; whether the model applies it, the trace sees."""
    return source.text_config.get("final_logit_softcapping")


def running(source: Source, options: Options) -> tuple[str, str]:
    """The dtype and device to run in."""
    import torch

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = options.dtype
    if dtype == "auto":
        stored = source.config.get("dtype") or source.config.get("torch_dtype") or source.text_config.get("dtype")
        dtype = str(stored) if str(stored) in ("float32", "bfloat16", "float16") else "float32"
    return dtype, device


def read_probe(path: Path, threshold: float | None) -> Probe:
    """A probe from a safetensors file with `sasa.probe.weight` (features,) and `sasa.probe.bias` ()."""
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from sasa_export.emit.weights import PROBE_BIAS, PROBE_WEIGHT
    from sasa_export.errors import CalibrationError

    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise CalibrationError(f"there is no probe file {path}. Check --probe.") from None
    except (SafetensorError, OSError) as error:
        raise CalibrationError(f"the probe file {path} is not valid safetensors ({error}).") from None
    missing = [name for name in (PROBE_WEIGHT, PROBE_BIAS) if name not in tensors]
    if missing:
        raise CalibrationError(f"the probe file {path} has no tensor {missing[0]}.")
    weight, bias = tensors[PROBE_WEIGHT].astype(np.float32), tensors[PROBE_BIAS].astype(np.float32)
    if weight.ndim != 1 or bias.size != 1:
        raise CalibrationError(f"the probe in {path} has shapes {weight.shape} and {bias.shape}, not (features,) and ().")
    if not (np.isfinite(weight).all() and np.isfinite(bias).all() and weight.any()):
        raise CalibrationError(f"the probe in {path} is zero, NaN or infinite, so it cannot judge.")
    return Probe(weight, float(bias.reshape(())), 0.5 if threshold is None else threshold)


def check_probe(probe: Probe | None, graph: LayerGraph, source: Source) -> None:
    """Raise CalibrationError where a given probe does not fit the model."""
    from sasa_export.errors import CalibrationError

    if probe is None:
        return
    space = "vocab_size" if graph.of("lane_head") else "hidden_size"
    features = int(source.text_config[space])
    if probe.weight.shape != (features,):
        raise CalibrationError(
            f"the probe has {probe.weight.shape[0]} weights and the model's {space} is {features}. "
            "It was made for another model."
        )


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


def _verify(
    staging: Path,
    model: Any,
    processor: Any,
    lane: LayerGraph,
    probe: Probe,
    prompts: Sequence[Prompt],
    calibration: Calibration | None,
    options: Options,
    report: Silent,
) -> list[Any]:
    from sasa_export.verify import check_files, check_model
    from sasa_export.verify.cases import choose, expect, write_cases

    checks = check_files(staging)
    if options.verify == "full":
        chosen = choose(prompts, None if calibration is None else list(calibration.final))
        expected = expect(model, processor, lane, probe, chosen)
        dtype = str(model.dtype).removeprefix("torch.")
        write_cases(chosen, expected, staging, {"dtype": dtype})
        device = str(model.device)
        checks += check_model(staging, device=device)
    for check in checks:
        report.check(check.passed, check.name, check.detail)
    failed = [check for check in checks if not check.passed]
    if failed:
        raise VerifyError(
            f"{len(failed)} of {len(checks)} checks failed ({failed[0].name}: {failed[0].detail}), "
            "so nothing was written."
        )
    return checks
