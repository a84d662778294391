"""From answers and features to arms, and from arms to everything that the report says."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sasa_export.prompts.prompt import Prompt
from sasa_export.research.command_line import command_line
from sasa_export.research.evaluate.arms import Answers, Arm, Figures, answering_arm, figures, fitted_arm, parts
from sasa_export.research.evaluate.depth import Depth, depth_curve
from sasa_export.research.evaluate.estimates import Estimate, Share, auc, bootstrap, share
from sasa_export.research.evaluate.fitted import Fitted, probe, words
from sasa_export.research.evaluate.judge import Judge
from sasa_export.research.evaluate.reliability import reliability
from sasa_export.research.evaluate.subject import Subject
from sasa_export.research.evaluate.targets import OVER_REFUSAL, Target, targets_of
from sasa_export.research.evaluate.timing import Timing

Features = dict[str, np.ndarray]  # (prompts, features): "plain" of the main lane, "projected" of the second, and depths


@dataclass(frozen=True)
class Evaluated:
    """Everything that an evaluation found.

    Attributes:
        subject: what was evaluated, on what, and how it ran.
        prompts, arms, figures: the evaluation prompts, and the arms and their figures over all prompts, by key: plain,
            patched, with or without (the probe that the patched model does not have), and words.
        parts: figures by kind of part, part and arm, `parts["channel"]["text"]["patched"]`; counts: prompts of a part.
        best: attack success rate and over-refusal at the best threshold, which is chosen on these very prompts.
        gain: differences of AUC. "projection": a probe with it less one without, both fitted here alike; "model": the
            patched model less words alone.
        identical: harmless prompts that the patched model allows, answered token for token as by the original.
        emitted: flagged prompts that are answered with the refusal.
        reliability: of each arm that detects; timing: by kind of prompt, allowed or refused.
    """

    subject: dict[str, Any]
    prompts: list[Prompt]
    arms: dict[str, Arm]
    figures: dict[str, Figures]
    parts: dict[str, dict[str, dict[str, Figures]]]
    counts: dict[str, dict[str, int]]
    targets: list[Target]
    best: tuple[float, float] | None
    gain: dict[str, Estimate]
    identical: Share | None
    emitted: Share | None
    reliability: dict[str, dict[str, Any]]
    timing: dict[str, Timing]
    depth: list[Depth]

    @property
    def labels(self) -> np.ndarray:
        return np.array([prompt.label for prompt in self.prompts])

    def to_json(self) -> dict[str, Any]:
        """All figures; `vars` makes the values in it JSON."""
        return {
            "tool": f"sasa-export {version('sasa-export')}",
            "subject": self.subject,
            "targets": [{**vars(target), "met": target.met} for target in self.targets],
            "best_threshold_in_hindsight": self.best and dict(zip(("attack", "over_refusal"), self.best, strict=True)),
            "arms": {
                key: {"title": arm.title, "threshold": arm.threshold, **self.figures[key]}
                for key, arm in self.arms.items()
            },
            "auc_gained_by": self.gain,
            "utility": {"identical": self.identical, "emitted": self.emitted},
            "reliability": self.reliability,
            "timing": self.timing,
            "depth_curve": self.depth,
            "parts": {
                kind: {part: {"prompts": self.counts[kind][part], **arms} for part, arms in held.items()}
                for kind, held in self.parts.items()
            },
        }


def measure(
    subject: Subject,
    answers: dict[str, Answers],
    features: dict[str, Features],
    timing: dict[str, Timing],
    judge: Judge | None,
) -> Evaluated:
    """All arms and all figures.

    Args:
        answers: of the "plain" and the "patched" model.
        features: of the "calibration" and the "evaluation" prompts, in the head's metric.
    """
    prompts = subject.evaluation
    labels, groups = np.array([prompt.label for prompt in prompts]), [prompt.group for prompt in prompts]
    fitted = _fitted(subject, features)
    arms = _arms(subject, answers, fitted, judge)
    flagged = answers["patched"].scores >= subject.sasa["threshold"]  # (prompts,)
    scores = {key: arm.scores for key, arm in arms.items() if arm.scores is not None}
    same = (answers["plain"].tokens == answers["patched"].tokens).all(1)  # (prompts,)
    rows = parts(prompts)

    def on(rows: np.ndarray) -> dict[str, Figures]:
        return {key: figures(arm, rows, prompts, subject.rate) for key, arm in arms.items()}

    def gained(better: np.ndarray, base: np.ndarray) -> Estimate:
        return bootstrap(lambda weights: auc(better, labels, weights) - auc(base, labels, weights), groups)

    overall = on(np.arange(len(prompts)))
    return Evaluated(
        subject=_described(subject),
        prompts=prompts,
        arms=arms,
        figures=overall,
        parts={kind: {part: on(held) for part, held in of.items()} for kind, of in rows.items()},
        counts={kind: {part: len(held) for part, held in of.items()} for kind, of in rows.items()},
        targets=targets_of(overall["patched"]),
        best=lowest_attack(scores["patched"], arms["plain"].refused, labels, OVER_REFUSAL),
        gain={
            "projection": gained(fitted["with"][0], fitted["without"][0]),
            "model": gained(scores["patched"], scores["words"]),
        },
        identical=share(same[(labels == 0) & ~flagged]),
        emitted=share(answers["patched"].are(subject.sasa["refusal_token_ids"])[flagged]),
        reliability={key: reliability(of, labels) for key, of in scores.items()},
        timing=timing,
        depth=depth_curve(subject, features) if subject.options.depth_curve else [],
    )


def _arms(
    subject: Subject,
    answers: dict[str, Answers],
    fitted: dict[str, Fitted],
    judge: Judge | None,
) -> dict[str, Arm]:
    prompts, threshold, said = subject.evaluation, float(subject.sasa["threshold"]), answers["patched"]
    own, other = ("without", "with") if subject.sasa["safety_layer"] is None else ("with", "without")
    plain = answering_arm("plain model", answers["plain"], np.zeros(len(prompts), bool), prompts, judge)
    gate = said.are(subject.sasa["refusal_token_ids"]) & (said.scores >= threshold)  # (prompts,)
    return {
        "plain": plain,
        "patched": answering_arm(f"patched model (probe {own} projection)", said, gate, prompts, judge, threshold),
        other: fitted_arm(f"probe {other} projection", plain, *fitted[other]),
        "words": fitted_arm("words alone", plain, *fitted["words"]),
    }


def lowest_attack(
    scores: np.ndarray, refused: np.ndarray, labels: np.ndarray, over_refusal: float
) -> tuple[float, float] | None:
    """What the best threshold would give, chosen on these very prompts: attack success rate and over-refusal.

    Args:
        scores: (prompts,), P(unsafe); refused: (prompts,), bool, what the plain model refuses in its own words.
        over_refusal: the largest allowed.

    None where the plain model alone refuses more harmless prompts than that.
    """
    from sklearn.metrics import roc_curve

    # What the model refuses itself has the highest score, and no threshold lets it through.
    ranked = np.where(refused, 2.0, scores)  # (prompts,)
    over, caught, thresholds = roc_curve(labels, ranked, drop_intermediate=False)  # (thresholds,) each
    allowed = (over <= over_refusal) & ((thresholds <= 2.0) | ~refused.any())
    return min(zip((1 - caught[allowed]).tolist(), over[allowed].tolist(), strict=True), default=None)


def _fitted(subject: Subject, features: dict[str, Features]) -> dict[str, Fitted]:
    """Scores and threshold of the probes with and without projection, fitted alike, and of words alone."""
    before, after, prompts = features["calibration"], features["evaluation"], subject.calibration
    found = {
        key: probe(before[lane], after[lane], prompts, subject.rate, subject.regularization)
        for key, lane in (("with", "projected"), ("without", "plain"))
    }
    return {**found, "words": words(prompts, subject.evaluation, subject.rate)}


def _described(subject: Subject) -> dict[str, Any]:
    """What was evaluated, on what, and how it ran; `command` makes the report again."""
    options, name = subject.options, subject.source.name
    harmful = sum(prompt.label for prompt in subject.evaluation)
    return {
        "model": options.model.resolve().name,
        "baseline": Path(name).name if Path(name).exists() else name,
        "family": subject.source.family.name,
        "graphs": subject.graphs,
        "safety_layer": subject.sasa["safety_layer"],
        "semantic_layer": subject.sasa["semantic_layer"],
        "blocks": subject.blocks[0],
        "lane_blocks": subject.blocks[1],
        "false_positive_rate": subject.rate,
        "given_threshold": subject.given_threshold,
        "dtype": subject.dtype,
        "device": subject.device.partition(":")[0],
        "harmful": harmful,
        "harmless": len(subject.evaluation) - harmful,
        "groups": len({prompt.group for prompt in subject.evaluation}),
        "data": ", ".join(options.data) or "the built-in evaluation set",
        "left_out": subject.left_out,
        "calibrated_on": subject.calibrated_on,
        "judge": options.judge,
        "max_new_tokens": options.max_new_tokens,
        "batch_size": subject.batch_size,
        "command": command_line("evaluate", options),
    }
