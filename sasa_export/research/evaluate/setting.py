"""What is evaluated, opened and checked, and how it runs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from sasa_export.files import check_apart
from sasa_export.graph import LayerGraph
from sasa_export.graph.rewrite import LaneSettings, rewrite_lane
from sasa_export.graph.trace import trace_source
from sasa_export.manifest import MANIFEST
from sasa_export.models import Source, layers_of
from sasa_export.models.load import load_processor, read_sizes, running
from sasa_export.prompts.prompt import Prompt
from sasa_export.report import Silent
from sasa_export.research.evaluate.depth import depths_of
from sasa_export.research.evaluate.options import EvaluateOptions
from sasa_export.research.evaluate.patched import Patched, open_baseline, open_patched
from sasa_export.research.evaluate.prompts import evaluation_prompts, fitting_prompts, limited
from sasa_export.research.locate.fingerprint import fingerprint
from sasa_export.workers import Workers


@dataclass(frozen=True)
class Setting:
    """A patched model, its original, and the prompts of both kinds, which share no picture and no question.

    Attributes:
        calibration: what the fitted arms are fitted on, and `calibrated_on` its name.
        left_out: how many prompts --limit left out.
        lane: the second lane, from which the fitted arms read their features.
        depths: nodes of the lane that are probed too, by block; empty without a depth curve.
    """

    options: EvaluateOptions
    patched: Patched
    source: Source
    processor: Any
    evaluation: list[Prompt]
    left_out: int
    calibration: list[Prompt]
    calibrated_on: str
    lane: LayerGraph
    depths: dict[int, str]
    dtype: str
    device: str

    @property
    def batch_size(self) -> int:
        """Of the answers, which are compared and so run in the same batches in both models."""
        return self.options.batch_size if self.patched.graphs is None else 1

    def fingerprint(self) -> dict[str, Any]:
        """What finished work depends on."""
        return fingerprint(
            self.source,
            [*self.evaluation, *self.calibration],
            patched=hashlib.sha256((self.patched.directory / MANIFEST).read_bytes()).hexdigest(),
            dtype=self.dtype,
            device=self.device.partition(":")[0],
            batch_size=self.options.batch_size,
            max_new_tokens=self.options.max_new_tokens,
        )


def open_setting(options: EvaluateOptions, team: Workers, report: Silent) -> Setting:
    """Open all that is evaluated; no weights are loaded. Raises SasaExportError."""
    patched = open_patched(options.model)
    source = open_baseline(patched, options.baseline)
    check_apart(options.out, patched.directory, source.directory)
    report.step("open", f"{options.model} ({patched.format}), made from {source.name}")
    processor = load_processor(source)

    def pieces(word: str) -> int:
        return len(processor.tokenizer.encode(f" {word}", add_special_tokens=False))

    everything = evaluation_prompts(options.data, pieces)
    calibration, calibrated_on = fitting_prompts(options.calibration, patched, everything, pieces)
    evaluation = limited(everything, options.limit)
    harmful = sum(prompt.label for prompt in evaluation)
    report.step("data", f"{harmful} harmful and {len(evaluation) - harmful} harmless prompts")
    lane = _lane(patched, source)
    depths = depths_of(lane) if options.depth_curve else {}
    dtype, device = running(source, options.dtype, team.device(options.device))
    left_out = len(everything) - len(evaluation)
    return Setting(
        options, patched, source, processor, evaluation, left_out, calibration, calibrated_on, lane, depths, dtype,
        device,
    )  # fmt: skip


def _lane(patched: Patched, source: Source) -> LayerGraph:
    """The patched model's second lane; where it has none, what the family's layers would give, to compare it with."""
    sasa, sizes = patched.sasa, read_sizes(source)
    given = sasa["safety_layer"], sasa["semantic_layer"]
    safety, semantic, _ = layers_of(source, sizes.blocks, sizes.hidden, *given)
    settings = LaneSettings(safety, semantic, sasa["epsilon"], sizes.softcap, sasa.get("probe_block"))
    return rewrite_lane(trace_source(source), settings)
