"""From answers and features to arms, and from arms to everything that the report says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sasa_export.models import Source
from sasa_export.probe.fit import in_metric
from sasa_export.research.command_line import command_line
from sasa_export.research.evaluate.answer import Answer
from sasa_export.research.evaluate.arm import Arm, Figures, answering, figures, gated, guarded, parts, spelled
from sasa_export.research.evaluate.compare import difference, lowest_attack
from sasa_export.research.evaluate.depth import Depth, depth_curve
from sasa_export.research.evaluate.features import Features
from sasa_export.research.evaluate.fitted import Fitted, probe, words
from sasa_export.research.evaluate.guarded import Guarded
from sasa_export.research.evaluate.judge import Judge
from sasa_export.research.evaluate.options import EvaluateOptions
from sasa_export.research.evaluate.prompts import Asked
from sasa_export.research.evaluate.reliability import reliability
from sasa_export.research.evaluate.result import Evaluated, Subject, Utility
from sasa_export.research.evaluate.shares import share
from sasa_export.research.evaluate.targets import ATTACK, AUC, OVER_REFUSAL, Target
from sasa_export.research.evaluate.timing import Timing
from sasa_export.research.evaluate.variants import Variant, calibrated, variants
from sasa_export.verify.check import cut_short

TITLES = {  # of the arms that are fitted here
    "with": "probe with projection",
    "without": "probe without projection",
    "words": "words alone",
}


@dataclass(frozen=True)
class Measured:
    """What the models were needed for. `metric` (hidden, hidden) is the head's; None where probes see logits."""

    guarded: Guarded
    source: Source
    asked: Asked
    plain: list[Answer]
    patched: list[Answer]
    metric: np.ndarray | None
    calibration: Features
    evaluation: Features
    depths: dict[int, str]
    timing: Timing | None
    dtype: str
    device: str
    batch_size: int

    @property
    def rate(self) -> float:
        """The largest false-positive rate that the patched model's threshold was chosen for, unless it was given."""
        return float(self.guarded.made.get("max_false_positive_rate", 0.02))

    @property
    def regularization(self) -> float | None:
        given = self.guarded.made.get("regularization", "auto")
        return None if given == "auto" else float(given)

    def in_metric(self, features: np.ndarray) -> np.ndarray:
        """Features (prompts, lanes * hidden) as calibration measures them."""
        return in_metric(features, self.metric)


def assess(measured: Measured, options: EvaluateOptions, judge: Judge | None) -> Evaluated:
    """All arms and all figures."""
    asked, rate = measured.asked, measured.rate
    prompts = asked.evaluation
    labels = np.array([prompt.label for prompt in prompts])
    groups = [prompt.group for prompt in prompts]
    plain = answering(measured.plain, prompts, judge)
    patched = guarded(measured.patched, prompts, measured.guarded.sasa, judge)
    lanes = {
        "with": (measured.calibration.projected, measured.evaluation.projected),
        "without": (measured.calibration.plain, measured.evaluation.plain),
    }
    fitted = {
        key: probe(
            measured.in_metric(before),
            measured.in_metric(after),
            asked.calibration,
            rate,
            measured.regularization,
            before.shape[1] // measured.calibration.plain.shape[1],
        )
        for key, (before, after) in lanes.items()
    }
    fitted["words"] = words(asked.calibration, prompts, rate)
    own = "without" if measured.guarded.sasa["safety_layer"] is None else "with"  # what the patched model is itself
    arms = [plain, patched]
    arms += [
        gated(key, title, plain, fitted[key].scores, fitted[key].threshold)
        for key, title in TITLES.items()
        if key != own
    ]

    everything = np.arange(len(prompts))
    overall = {arm.key: figures(arm, everything, prompts, rate) for arm in arms}
    divided = parts(prompts)
    assert patched.scores is not None
    return Evaluated(
        subject=_subject(measured, options, labels, groups),
        prompts=prompts,
        arms=tuple(arms),
        overall=overall,
        parts={
            kind: {
                part: {arm.key: figures(arm, rows, prompts, rate) for arm in arms}
                for part, rows in divided[kind].items()
            }
            for kind in divided
        },
        counts={kind: {part: len(rows) for part, rows in divided[kind].items()} for kind in divided},
        targets=_targets(overall["patched"]),
        best=lowest_attack(patched.scores, plain.refused, labels, OVER_REFUSAL),
        gain={
            "projection": difference(fitted["with"].scores, fitted["without"].scores, labels, groups),
            "model": difference(patched.scores, fitted["words"].scores, labels, groups),
        },
        fitted={key: _summary(found) for key, found in fitted.items()},
        utility=_utility(measured, patched, labels),
        reliability={arm.key: reliability(arm.scores, labels) for arm in arms if arm.scores is not None},
        timing=measured.timing,
        depth=_depth(measured, rate),
        variants=_variants(measured, fitted["with"], fitted["without"], rate) if options.variants else (),
        calibrated=calibrated(fitted["with"], asked.calibration, prompts) if options.variants else None,
    )


def _targets(found: Figures) -> tuple[Target, ...]:
    assert found.attack is not None and found.over_refusal is not None and found.detection is not None
    return (
        Target("Attack success rate", ATTACK, found.attack),
        Target("Over-refusal", OVER_REFUSAL, found.over_refusal),
        Target("AUC", AUC, found.detection.auc, at_least=True),
    )


def _utility(measured: Measured, patched: Arm, labels: np.ndarray) -> Utility:
    assert patched.flagged is not None
    allowed = (labels == 0) & ~patched.flagged
    same = np.array([one.tokens == other.tokens for one, other in zip(measured.plain, measured.patched, strict=True)])
    refusal = measured.guarded.refusal
    written = np.array([spelled(answer, refusal) for answer in measured.patched])
    cut = None
    if measured.guarded.sasa.get("gate", "prompt") == "every-token":
        pairs = zip(measured.plain, measured.patched, strict=True)
        turned = [cut_short(list(one.tokens), list(other.tokens), refusal) for one, other in pairs]
        cut = share((np.array(turned) & ~same)[allowed])
    return Utility(share(same[allowed]), share(written[patched.flagged]), cut)


def _depth(measured: Measured, rate: float) -> tuple[Depth, ...]:
    if not measured.depths:
        return ()
    last = measured.guarded.sasa.get("probe_block")
    last = measured.guarded.blocks - 1 if last is None else last
    before, after = (
        {
            **{block: measured.in_metric(found.depths[node]) for block, node in measured.depths.items()},
            last: measured.in_metric(found.projected),
        }
        for found in (measured.calibration, measured.evaluation)
    )
    asked = measured.asked
    return depth_curve(
        before, after, measured.guarded.blocks, asked.calibration, asked.evaluation, rate, measured.regularization
    )


def _variants(measured: Measured, base: Fitted, plain: Fitted, rate: float) -> tuple[Variant, ...]:
    asked = measured.asked
    return variants(
        measured.calibration, measured.evaluation, measured.in_metric, asked.calibration, asked.evaluation, base, plain,
        rate,        measured.regularization,
    )  # fmt: skip


def _summary(found: Fitted) -> dict[str, Any]:
    return {
        "threshold": found.threshold,
        "regularization": found.regularization,
        "auc_on_the_calibration_prompts_cross_validated": round(found.calibration_auc, 4),
    }


def _subject(measured: Measured, options: EvaluateOptions, labels: np.ndarray, groups: list[str]) -> Subject:
    guarded, source, asked = measured.guarded, measured.source, measured.asked
    local = Path(source.name)
    return Subject(
        model=guarded.directory.resolve().name,
        baseline=local.name if local.exists() else source.name,
        family=source.family.name,
        format=guarded.format,
        graphs=guarded.graphs,
        safety_layer=guarded.sasa["safety_layer"],
        semantic_layer=guarded.sasa["semantic_layer"],
        further_pairs=guarded.further_pairs,
        blocks=guarded.blocks,
        again=guarded.again,
        rate=measured.rate,
        threshold=guarded.sasa["threshold"] if guarded.made.get("threshold") or guarded.made.get("probe") else None,
        dtype=measured.dtype,
        device=measured.device.partition(":")[0],
        harmful=int(labels.sum()),
        harmless=int((labels == 0).sum()),
        groups=len(set(groups)),
        data=", ".join(options.data) if options.data else "the built-in evaluation set",
        left_out=asked.left_out,
        calibrated_on=asked.calibrated_on,
        judge=options.judge,
        tokens=options.max_new_tokens,
        batch_size=measured.batch_size,
        command=command_line("evaluate", options),
    )
