"""The whole tool as one walk through the house: open -> trace -> calibrate -> rewrite -> emit -> verify."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from sasa_export.calibrate import Calibration
from sasa_export.calibrate.given import check_probe, read_probe
from sasa_export.calibrate.probe import Probe
from sasa_export.emit.card import write_card
from sasa_export.emit.config import generation_prompt_ids, refusal_ids, sasa_settings, turn_token_ids
from sasa_export.emit.directory import Patch, write_directory
from sasa_export.emit.manifest import write_manifest
from sasa_export.emit.onnx.card import not_counted
from sasa_export.emit.onnx.directory import check_possible, finish, write_onnx_directory
from sasa_export.emit.onnx.room import needed_bytes
from sasa_export.emit.staging import check_apart, check_disk, check_free, claimed, staged
from sasa_export.errors import VerifyError
from sasa_export.graph import LayerGraph
from sasa_export.locate.pairs import with_layer
from sasa_export.measure import measure
from sasa_export.open import Source, layers_of, open_source
from sasa_export.open.load import SPREAD, load_processor, read_sizes, skeleton
from sasa_export.options import Options
from sasa_export.report import Silent
from sasa_export.rewrite import LaneSettings, rewrite
from sasa_export.share import Crew, crew
from sasa_export.trace import trace
from sasa_export.verify import Check, check_files, check_graphs, check_model, check_onnx_against
from sasa_export.verify.flips import reference

SPARE_BYTES = 64_000_000  # processor, tokenizer, card, scores and verification pictures


@dataclass(frozen=True)
class Patched:
    """A written, verified directory, and what was measured on the way."""

    directory: Path
    graph: LayerGraph
    probe: Probe
    calibration: Calibration | None


def patch(options: Options, report: Silent | None = None) -> Patched:
    """Turn a vision-language model into a guarded one. Raises SasaExportError; then nothing is written.

    Several processes (`sasa_export.share`) share the calibration, and the first of them writes.
    """
    team = crew()
    report = report if report is not None and team.leads else Silent()
    options = replace(options, device=team.device(options.device))
    options.check()
    # The second of two runs on one output is told at once, and not after its calibration.
    with claimed(options.out) if team.leads else nullcontext():
        return _patch(options, report, team)


def _patch(options: Options, report: Silent, team: Crew) -> Patched:
    check_free(options.out, force=options.force)
    team.wait()  # nobody writes while another still looks
    given = read_probe(options.probe, options.threshold) if options.probe else None

    source = open_source(options.model)
    check_apart(options.out, source.directory, options.probe, *map(Path, options.calibration))
    if options.format != "safetensors":
        check_possible(source, options)
    needed = _needed_disk(source, options)
    check_disk(options.out, needed)
    report.step("open", f"{source.name}: family {source.family.name}, {source.weight_bytes() / 1e6:,.0f} MB")
    sizes = read_sizes(source)
    given_layers = [
        layer if isinstance(layer, int) else None for layer in (options.safety_layer, options.semantic_layer)
    ]
    safety: int | None
    semantic: int | None
    safety, semantic, layers_from = layers_of(source, sizes.blocks, sizes.hidden, *given_layers)
    if options.projection == "none":
        safety = semantic = None
        layers_from = "none: made without projection"
    elif options.finds_layers():
        safety, semantic = with_layer(sizes.blocks, *given_layers)[0]  # stand-ins until they are found
    elif "not measured" in layers_from:
        report.warn(f"safety layer {safety} and semantic layer {semantic} are {layers_from}.")

    graph = trace_source(source)
    settings = LaneSettings(
        safety, semantic, options.epsilon, sizes.softcap, options.probe_block, options.probe_positions,
        options.further_pairs(),
    )  # fmt: skip
    full = rewrite(graph, settings)  # here already, so that layers out of range are an error before the work
    report.step("trace", f"{len(graph.of('block'))} blocks as graphs/{source.family.name}.toml says")
    check_probe(given, max(1, len(settings.pairs)) * (sizes.vocabulary if full.of("lane_head") else sizes.hidden))

    processor = load_processor(source)
    measured = measure(source, processor, graph, settings, given, options, report)
    if measured.layers is not None:
        safety, semantic = measured.layers.settings.safety_layer, measured.layers.settings.semantic_layer
        full, layers_from = rewrite(graph, measured.layers.settings), measured.layers.layers_from
    probe = measured.probe
    opening = generation_prompt_ids(processor)
    sasa = sasa_settings(
        full,
        safety_layer=safety,
        semantic_layer=semantic,
        further_pairs=[list(pair) for pair in options.further_pairs()],
        probe_block=options.probe_block,
        probe_positions=options.probe_positions,
        layers_from=layers_from,
        epsilon=options.epsilon,
        threshold=probe.threshold,
        refusal=options.refusal,
        refusal_token_ids=refusal_ids(processor, source.directory, options.refusal),
        generation_prompt_ids=opening,
        turn_token_ids=turn_token_ids(processor, source.directory, opening),
        gate=options.gate,
    )
    where = "no second lane" if safety is None else f"second lane from block {safety + 1}"
    where += "".join(f", another from block {pair[0] + 1}" for pair in settings.further_pairs)
    report.step("rewrite", f"{where}, threshold {probe.threshold:.4f}")
    if options.gate == "every-token":
        report.warn(
            "every token of an answer is judged at the threshold that was set on prompts, so harmless answers may end "
            "in the refusal. Count them before you serve it: sasa-export evaluate"
        )
    if not team.leads:
        team.wait()
        return Patched(options.out, full, probe, measured.calibration)

    result = Patch(source, full, sasa, probe, measured.calibration, measured.cases, measured.dtype)
    device = "auto" if measured.device == SPREAD else measured.device  # as transformers calls it
    with staged(options.out, force=options.force, needed_bytes=needed) as staging:
        plain = staging if options.format == "safetensors" else staging / "safetensors"
        plain.mkdir(exist_ok=True)
        _write_safetensors(result, plain, options, device, report)
        if options.format != "safetensors":
            graphs = staging if options.format == "onnx" else staging / "onnx"
            graphs.mkdir(exist_ok=True)
            _write_onnx(result, plain, graphs, options, device, report)
    report.step("done", f"{options.out}")
    team.wait()
    return Patched(options.out, full, probe, measured.calibration)


def _needed_disk(source: Source, options: Options) -> int:
    """Bytes of disk below --out, at most. The graphs are made from a copy for transformers, wanted or not."""
    needed = SPARE_BYTES + (0 if options.link else source.weight_bytes())
    if options.format != "safetensors":
        needed += SPARE_BYTES + needed_bytes(source, options.onnx_dtype)
    return needed


def _write_safetensors(patch: Patch, directory: Path, options: Options, device: str, report: Silent) -> None:
    """Write the directory for transformers and verify it."""
    with report.bar(patch.source.weight_bytes(), "emit") as advance:
        digests = write_directory(patch, directory, link=options.link, advance=advance)
    checks = check_files(directory)
    if patch.cases:
        checks += check_model(directory, device=device)
    _all_passed(checks, report)
    write_card(patch.source, patch.graph, patch.sasa, patch.calibration, checks, options.verify, directory)
    write_manifest(directory, digests, options=options.to_json(), layers_from=patch.sasa["layers_from"])


def _write_onnx(patch: Patch, plain: Path, directory: Path, options: Options, device: str, report: Silent) -> None:
    """Write the ONNX directory from the one for transformers, which goes where nobody asked for it, and verify it."""
    write_onnx_directory(
        plain, directory, opset=options.opset, dtype=options.onnx_dtype, advance=lambda step: report.step("onnx", step)
    )
    if options.format == "onnx":
        shutil.rmtree(plain)
    if patch.cases:
        wanted = None
        if patch.calibration is not None:
            count, most = options.flip_prompts, options.max_flips
            wanted = reference(patch.calibration, count=count, most=most, dtype=patch.dtype)
            report.step("verify", f"the graphs judge {len(wanted.prompts)} calibration prompts again")
        checks, flips = check_onnx_against(directory, wanted, device=device)
    else:
        checks, flips = check_graphs(directory), None
    _all_passed(checks, report)
    if flips is None:
        report.step("verify", not_counted(options))
    finish(patch.source, patch.sasa, patch.calibration, checks, flips, options, directory)


def trace_source(source: Source) -> LayerGraph:
    """Trace a source on fake weights: its shapes alone, in no memory."""
    import torch

    with skeleton(source) as model:
        return trace(model, source.family, {"input_ids": torch.ones(1, 5, dtype=torch.long)})


def _all_passed(checks: list[Check], report: Silent) -> None:
    for check in checks:
        report.check(check.passed, check.name, check.detail)
    failed = [check for check in checks if not check.passed]
    if failed:
        raise VerifyError(
            f"{len(failed)} of {len(checks)} checks failed ({failed[0].name}: {failed[0].detail}), "
            "so nothing was written."
        )
