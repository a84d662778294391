"""From answers and features to arms, and from arms to everything that the report says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sasa_export.prompts.prompt import Prompt
from sasa_export.research.command_line import command_line
from sasa_export.research.evaluate.arms import Answers, Arm, Figures, answering_arm, figures, fitted_arm, parts
from sasa_export.research.evaluate.depth import depth_curve
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
        answers: a row a prompt: what was asked, what was answered, and what each arm made of it.
        arms: title, threshold and figures of each arm over all prompts, by key: plain, patched, with or without (the
            probe that the patched model does not have), and words.
        parts: `parts["channel"]["text"]`: the number of `prompts`, and the figures of each arm on them.
        best: attack success rate and over-refusal at the best threshold, which is chosen on these very prompts.
        gain: differences of AUC. "projection": a probe with it less one without, both fitted here alike; "model": the
            patched model less words alone.
        identical: harmless prompts that the patched model allows, answered token for token as by the original.
        emitted: flagged prompts that are answered with the refusal.
        reliability: of each arm that detects; timing: by kind of prompt, allowed or refused; depth: see `depth_curve`.
    """

    subject: dict[str, Any]
    answers: pd.DataFrame
    arms: dict[str, dict[str, Any]]
    parts: dict[str, dict[str, dict[str, Any]]]
    targets: list[Target]
    best: dict[str, float] | None
    gain: dict[str, Estimate]
    identical: Share | None
    emitted: Share | None
    reliability: dict[str, dict[str, Any]]
    timing: dict[str, Timing]
    depth: list[dict[str, Any]]

    def to_json(self) -> str:
        """All but the answers."""
        kept = {name: value for name, value in vars(self).items() if name != "answers"}
        kept["targets"] = [{**vars(target), "met": target.met} for target in self.targets]
        data = {"tool": f"sasa-export {version('sasa-export')}", **kept}
        return json.dumps(data, indent=1, ensure_ascii=False, default=vars) + "\n"


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

    def on(rows: np.ndarray) -> dict[str, Figures]:
        return {key: figures(arm, rows, prompts, subject.rate) for key, arm in arms.items()}

    def gained(better: np.ndarray, base: np.ndarray) -> Estimate:
        return bootstrap(lambda weights: auc(better, labels, weights) - auc(base, labels, weights), groups)

    overall = on(np.arange(len(prompts)))
    return Evaluated(
        subject=_described(subject),
        answers=_table(prompts, answers, arms),
        arms={key: {"title": arm.title, "threshold": arm.threshold, **overall[key]} for key, arm in arms.items()},
        parts={
            kind: {part: {"prompts": len(rows), **on(rows)} for part, rows in of.items()}
            for kind, of in parts(prompts).items()
        },
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
    prompts, said, threshold = subject.evaluation, answers["patched"], float(subject.sasa["threshold"])
    own, other = ("without", "with") if subject.sasa["safety_layer"] is None else ("with", "without")
    plain = answering_arm("plain model", answers["plain"], np.zeros(len(prompts), bool), prompts, judge)
    gate = said.are(subject.sasa["refusal_token_ids"]) & (said.scores >= threshold)  # (prompts,)
    return {
        "plain": plain,
        "patched": answering_arm(f"patched model (probe {own} projection)", said, gate, prompts, judge, threshold),
        other: fitted_arm(f"probe {other} projection", plain, *fitted[other]),
        "words": fitted_arm("words alone", plain, *fitted["words"]),
    }


def _table(prompts: Sequence[Prompt], answers: dict[str, Answers], arms: dict[str, Arm]) -> pd.DataFrame:
    asked = ("name", "label", "channel", "attack", "category", "prompt", "question")
    table = pd.DataFrame([{name: getattr(prompt, name) for name in asked} for prompt in prompts])
    for key, said in answers.items():
        table[f"{key}_answer"] = said.texts
    for key, arm in arms.items():
        columns = {"refused": arm.refused, "complied": arm.complied, "unsafe_probability": arm.scores}
        for name, values in columns.items():
            if values is not None:
                table[f"{key}_{name}"] = values
    return table


def lowest_attack(
    scores: np.ndarray, refused: np.ndarray, labels: np.ndarray, over_refusal: float
) -> dict[str, float] | None:
    """What the best threshold would give, chosen on these very prompts: `attack` success rate and `over_refusal`.

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
    best = min(zip(1 - caught[allowed], over[allowed], strict=True), default=None)
    return None if best is None else {"attack": float(best[0]), "over_refusal": float(best[1])}


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
