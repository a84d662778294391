"""From answers and features to arms, and from arms to everything that the report says."""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sasa_export.probe.fit import in_metric
from sasa_export.prompts.prompt import Prompt
from sasa_export.research.command_line import command_line
from sasa_export.research.evaluate.arms import (
    Answers,
    Arm,
    Figures,
    emitted,
    figures,
    fitted_arm,
    lowest_attack,
    parts,
    patched_arm,
    plain_arm,
)
from sasa_export.research.evaluate.depth import Depth, depth_curve
from sasa_export.research.evaluate.estimates import Estimate, Share, auc, bootstrap, share
from sasa_export.research.evaluate.fitted import Fitted, probe, words
from sasa_export.research.evaluate.judge import Judge
from sasa_export.research.evaluate.reliability import Reliability, reliability
from sasa_export.research.evaluate.setting import Setting
from sasa_export.research.evaluate.targets import OVER_REFUSAL, Target, targets_of
from sasa_export.research.evaluate.timing import Timing

TITLES = {  # of the arms that are fitted here
    "with": "probe with projection",
    "without": "probe without projection",
    "words": "words alone",
}

Features = dict[str, np.ndarray]  # (prompts, features): "plain" of the main lane, "projected" of the second, and depths


@dataclass(frozen=True)
class Part:
    """Some of the prompts: how many, and the figures of each arm."""

    prompts: int
    figures: dict[str, Figures]


@dataclass(frozen=True)
class Evaluated:
    """Everything that an evaluation found.

    Attributes:
        subject: what was evaluated, on what, and how it ran.
        prompts, arms, figures: the evaluation prompts, and the arms and their figures over all prompts, by key: plain,
            patched, with or without (the probe that the patched model does not have), and words.
        parts: by kind of part and part: `parts["channel"]["text"].figures["patched"]`.
        best: attack success rate and over-refusal at the best threshold, which is chosen on these very prompts.
        gain: differences of AUC. "projection": a probe with it less one without, both fitted here alike; "model": the
            patched model less words alone.
        fitted: threshold, strength of regularization and cross-validated AUC of the arms that were fitted here.
        identical: harmless prompts that the patched model allows, answered token for token as by the original.
        emitted: flagged prompts that are answered with the refusal.
        timing: by kind of prompt, allowed or refused.
    """

    subject: dict[str, Any]
    prompts: list[Prompt]
    arms: dict[str, Arm]
    figures: dict[str, Figures]
    parts: dict[str, dict[str, Part]]
    targets: list[Target]
    best: dict[str, float] | None
    gain: dict[str, Estimate]
    fitted: dict[str, dict[str, Any]]
    identical: Share | None
    emitted: Share | None
    reliability: dict[str, Reliability]
    timing: dict[str, Timing]
    depth: list[Depth]

    @property
    def labels(self) -> np.ndarray:
        return np.array([prompt.label for prompt in self.prompts])

    def to_json(self) -> dict[str, Any]:
        """All figures, as plain values of six significant digits."""
        found = {
            "tool": f"sasa-export {version('sasa-export')}",
            "subject": self.subject,
            "targets": [{**vars(target), "met": target.met} for target in self.targets],
            "best_threshold_in_hindsight": self.best,
            "arms": {
                key: {"title": arm.title, "threshold": arm.threshold, **self.figures[key]}
                for key, arm in self.arms.items()
            },
            "fitted": self.fitted,
            "auc_gained_by": self.gain,
            "utility": {"identical": self.identical, "emitted": self.emitted},
            "reliability": self.reliability,
            "timing": self.timing,
            "depth_curve": self.depth,
            "parts": {
                kind: {name: {"prompts": part.prompts, **part.figures} for name, part in held.items()}
                for kind, held in self.parts.items()
            },
        }
        return _plain(found)


def measure(
    setting: Setting,
    answers: dict[str, Answers],
    features: dict[str, Features],
    metric: np.ndarray | None,
    timing: dict[str, Timing],
    judge: Judge | None,
) -> Evaluated:
    """All arms and all figures.

    Args:
        answers: of the "plain" and the "patched" model; features: of the "calibration" and the "evaluation" prompts.
        metric: (hidden, hidden), the head's; None where probes see logits.
    """
    prompts, patched = setting.evaluation, setting.patched
    labels, groups = np.array([prompt.label for prompt in prompts]), [prompt.group for prompt in prompts]
    fitted = _fitted(setting, features, metric)
    plain = plain_arm(answers["plain"], prompts, judge)
    arms = {"plain": plain, "patched": patched_arm(answers["patched"], prompts, patched, judge)}
    own = "without" if patched.sasa["safety_layer"] is None else "with"  # what the patched model is itself
    arms |= {key: fitted_arm(title, plain, fitted[key]) for key, title in TITLES.items() if key != own}
    scores = {key: arm.scores for key, arm in arms.items() if arm.scores is not None}
    flagged = scores["patched"] >= patched.sasa["threshold"]  # (prompts,)
    same = (answers["plain"].tokens == answers["patched"].tokens).all(1)  # (prompts,)

    def on(rows: np.ndarray) -> dict[str, Figures]:
        return {key: figures(arm, rows, prompts, patched.rate) for key, arm in arms.items()}

    def gained(better: np.ndarray, base: np.ndarray) -> Estimate:
        return bootstrap(lambda weights: auc(better, labels, weights) - auc(base, labels, weights), groups)

    overall = on(np.arange(len(prompts)))
    return Evaluated(
        subject=_subject(setting),
        prompts=prompts,
        arms=arms,
        figures=overall,
        parts={
            kind: {name: Part(len(rows), on(rows)) for name, rows in held.items()}
            for kind, held in parts(prompts).items()
        },
        targets=targets_of(overall["patched"]),
        best=lowest_attack(scores["patched"], plain.refused, labels, OVER_REFUSAL),
        gain={
            "projection": gained(fitted["with"].scores, fitted["without"].scores),
            "model": gained(scores["patched"], fitted["words"].scores),
        },
        fitted={
            key: {name: value for name, value in vars(of).items() if name != "scores"} for key, of in fitted.items()
        },
        identical=share(same[(labels == 0) & ~flagged]),
        emitted=share(emitted(answers["patched"], patched.sasa["refusal_token_ids"])[flagged]),
        reliability={key: reliability(of, labels) for key, of in scores.items()},
        timing=timing,
        depth=_depth(setting, features, metric),
    )


def _fitted(setting: Setting, features: dict[str, Features], metric: np.ndarray | None) -> dict[str, Fitted]:
    rate, regularization = setting.patched.rate, setting.patched.regularization
    probes = {
        key: probe(
            in_metric(features["calibration"][lane], metric), in_metric(features["evaluation"][lane], metric),
            setting.calibration, rate, regularization,
        )
        for key, lane in (("with", "projected"), ("without", "plain"))
    }  # fmt: skip
    return {**probes, "words": words(setting.calibration, setting.evaluation, rate)}


def _depth(setting: Setting, features: dict[str, Features], metric: np.ndarray | None) -> list[Depth]:
    if not setting.depths:
        return []
    patched, last = setting.patched, setting.patched.sasa.get("probe_block")
    nodes = {**setting.depths, patched.blocks - 1 if last is None else last: "projected"}
    before, after = (
        {block: in_metric(features[kind][node], metric) for block, node in nodes.items()}
        for kind in ("calibration", "evaluation")
    )
    return depth_curve(
        before, after, patched.blocks, setting.calibration, setting.evaluation, patched.rate, patched.regularization
    )


def _subject(setting: Setting) -> dict[str, Any]:
    """What was evaluated, on what, and how it ran; `command` makes the report again."""
    options, patched, name = setting.options, setting.patched, setting.source.name
    harmful = sum(prompt.label for prompt in setting.evaluation)
    return {
        "model": patched.directory.resolve().name,
        "baseline": Path(name).name if Path(name).exists() else name,
        "family": setting.source.family.name,
        "format": patched.format,
        "graphs": patched.graphs,
        "safety_layer": patched.sasa["safety_layer"],
        "semantic_layer": patched.sasa["semantic_layer"],
        "blocks": patched.blocks,
        "lane_blocks": patched.lane_blocks,
        "false_positive_rate": patched.rate,
        "given_threshold": patched.given_threshold,
        "dtype": setting.dtype,
        "device": setting.device.partition(":")[0],
        "harmful": harmful,
        "harmless": len(setting.evaluation) - harmful,
        "groups": len({prompt.group for prompt in setting.evaluation}),
        "data": ", ".join(options.data) or "the built-in evaluation set",
        "left_out": setting.left_out,
        "calibrated_on": setting.calibrated_on,
        "judge": options.judge,
        "max_new_tokens": options.max_new_tokens,
        "batch_size": setting.batch_size,
        "command": command_line("evaluate", options),
    }


def _plain(value: Any) -> Any:
    """Dataclasses, lists and dictionaries as JSON has them."""
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
