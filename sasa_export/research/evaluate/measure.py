"""From answers and features to arms, and from arms to everything that the report says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sasa_export.probe.intervals import Estimate, Share, auc, bootstrap, share
from sasa_export.prompts.prompt import Prompt
from sasa_export.prompts.shares import labels_and_groups
from sasa_export.research.evaluate.arms import Answers, Arm, Figures, answering_arm, changes, figures, fitted_arm, parts
from sasa_export.research.evaluate.fitted import Features, Judged, depth_curve, fitted_arms
from sasa_export.research.evaluate.judge import Judge
from sasa_export.research.evaluate.subject import Subject
from sasa_export.research.evaluate.timing import Timing


@dataclass(frozen=True)
class Evaluated:
    """Everything that an evaluation found.

    Attributes:
        subject: what was evaluated, on what, and how it ran.
        answers: a row a prompt: what was asked, what was answered, and what each arm made of it.
        arms: title, threshold and figures of each arm over all prompts, by key: plain, patched, against (--against),
            with or without (the probe that the patched model does not have), and words.
        parts: `parts["channel"]["text"]`: the number of `prompts`, and the figures of each arm on them.
        gain: differences of AUC. "projection": a probe with it less one without, both fitted here alike; "model": the
            patched model less words alone.
        identical: harmless prompts that the patched model allows, answered token for token as by the original.
        emitted: flagged prompts that are answered with the refusal.
        changes: from the patched model to that of --against, see `changes`; none without.
        timing: by kind of prompt, allowed or refused; depth: see `depth_curve`.
    """

    subject: dict[str, Any]
    answers: pd.DataFrame
    arms: dict[str, dict[str, Any]]
    parts: dict[str, dict[str, dict[str, Any]]]
    gain: dict[str, Estimate]
    identical: Share | None
    emitted: Share | None
    changes: list[dict[str, Any]]
    timing: dict[str, Timing]
    depth: list[dict[str, Any]]

    @property
    def detecting(self) -> list[str]:
        """The arms that have scores, by key."""
        return [key for key in self.arms if f"{key}_unsafe_probability" in self.answers]


def measure(
    subject: Subject,
    answers: dict[str, Answers],
    features: dict[str, Features],
    metric: np.ndarray | None,
    timing: dict[str, Timing],
    judge: Judge | None,
) -> Evaluated:
    """All arms and all figures.

    Args:
        answers: of the "plain" and the "patched" model, and of that of --"against".
        features: of the "evaluation" prompts, and of the "calibration" prompts where something is fitted on them.
        metric: the head's (`head_metric`), in which it is fitted; None where the features are logits.
    """
    prompts, fitted = subject.evaluation, fitted_arms(subject, features, metric)
    labels, groups = labels_and_groups(prompts)
    arms = _arms(subject, answers, fitted, judge)
    scores = {key: arm.scores for key, arm in arms.items() if arm.scores is not None}  # (prompts,) each
    flagged = scores["patched"] >= subject.sasa["threshold"]  # (prompts,)
    same = (answers["plain"].tokens == answers["patched"].tokens).all(1)  # (prompts,)

    def on(rows: np.ndarray) -> dict[str, Figures]:
        return {key: figures(arm, rows, prompts, subject.rate) for key, arm in arms.items()}

    def gained(better: np.ndarray, base: np.ndarray) -> Estimate:
        return bootstrap(lambda weights: auc(better, labels, weights) - auc(base, labels, weights), groups)

    overall = on(np.arange(len(prompts)))
    return Evaluated(
        subject=subject.described(),
        answers=_table(prompts, answers, arms),
        arms={key: {"title": arm.title, "threshold": arm.threshold, **overall[key]} for key, arm in arms.items()},
        parts={
            kind: {part: {"prompts": len(rows), **on(rows)} for part, rows in of.items()}
            for kind, of in parts(prompts).items()
        },
        gain={
            "projection": gained(fitted["with"][0], fitted["without"][0]),
            "model": gained(scores["patched"], scores["words"]),
        },
        identical=share(same[(labels == 0) & ~flagged]),
        emitted=share(answers["patched"].are(subject.sasa["refusal_token_ids"])[flagged]),
        changes=changes(arms["patched"], arms["against"], prompts) if "against" in arms else [],
        timing=timing,
        depth=depth_curve(subject, features, metric) if subject.options.depth_curve else [],
    )


def _arms(
    subject: Subject, answers: dict[str, Answers], fitted: dict[str, Judged], judge: Judge | None
) -> dict[str, Arm]:
    prompts = subject.evaluation
    own, other = ("without", "with") if subject.sasa["safety_layer"] is None else ("with", "without")
    plain = answering_arm("plain model", answers["plain"], np.zeros(len(prompts), bool), prompts, judge)

    def guarded(title: str, said: Answers, sasa: dict[str, Any]) -> Arm:
        assert said.scores is not None  # it has a gate
        gate = said.are(sasa["refusal_token_ids"]) & (said.scores >= sasa["threshold"])  # (prompts,)
        return answering_arm(title, said, gate, prompts, judge, float(sasa["threshold"]))

    against = None if subject.against is None else guarded(subject.beside, answers["against"], subject.against)
    return {
        "plain": plain,
        "patched": guarded(f"patched model (probe {own} projection)", answers["patched"], subject.sasa),
        **({} if against is None else {"against": against}),
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
