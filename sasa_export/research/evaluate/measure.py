"""From answers and features to arms, and from arms to everything that the report says.

Two arms are fitted on the calibration prompts, a probe and words alone: logistic regressions, their strength of
regularization chosen by cross-validation, with the threshold that the false-positive rate allows, as in calibration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sasa_export.errors import CalibrationError
from sasa_export.probe import Fitted, choose_threshold
from sasa_export.probe.features import Features
from sasa_export.probe.fit import probability, threshold_of
from sasa_export.probe.folds import folds_of
from sasa_export.probe.intervals import Comparable, Share, auc_of, difference, share
from sasa_export.probe.words import bag_of_words, best_words
from sasa_export.prompts.prompt import Prompt, asked
from sasa_export.prompts.shares import labels_and_groups
from sasa_export.research.evaluate.arms import Answers, Arm, Figures, answering_arm, changes, figures, fitted_arm, parts
from sasa_export.research.evaluate.subject import Subject

Judged = tuple[np.ndarray, float | None]  # P(unsafe) of the evaluation prompts, and a threshold if one keeps the rate


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
    """

    subject: dict[str, Any]
    answers: pd.DataFrame
    arms: dict[str, dict[str, Any]]
    parts: dict[str, dict[str, dict[str, Any]]]
    gain: dict[str, Comparable]
    identical: Share | None
    emitted: Share | None
    changes: list[dict[str, Any]]

    @property
    def detecting(self) -> list[str]:
        """The arms that have scores, by key."""
        return [key for key in self.arms if f"{key}_unsafe_probability" in self.answers]


def measure(subject: Subject, answers: dict[str, Answers], features: Features, fitted: Fitted) -> Evaluated:
    """All arms and all figures.

    Args:
        answers: of the "plain" and the "patched" model, and of that of --"against".
        features: of the evaluation prompts.
        fitted: probes on the calibration prompts.
    """
    prompts, calibration, rate = subject.evaluation, subject.calibration, subject.rate
    judged = {
        "with": probe(fitted, "projected", features.projected, calibration, rate),
        "without": probe(fitted, "plain", features.plain, calibration, rate),
        "words": words(calibration, prompts, rate),
    }
    labels, groups = labels_and_groups(prompts)
    arms = _arms(subject, answers, judged)
    scores = answers["patched"].scores  # (prompts,)
    assert scores is not None  # it has a gate
    flagged = scores >= subject.sasa["threshold"]  # (prompts,)
    same = (answers["plain"].tokens == answers["patched"].tokens).all(1)  # (prompts,)

    def on(rows: np.ndarray) -> dict[str, Figures]:
        return {key: figures(arm, rows, prompts, subject.rate) for key, arm in arms.items()}

    def gained(better: np.ndarray, base: np.ndarray) -> Comparable:
        return difference(auc_of(better, labels, groups), auc_of(base, labels, groups))

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
            "projection": gained(judged["with"][0], judged["without"][0]),
            "model": gained(scores, judged["words"][0]),
        },
        identical=share(same[(labels == 0) & ~flagged]),
        emitted=share(answers["patched"].are(subject.sasa["refusal_token_ids"])[flagged]),
        changes=changes(arms["patched"], arms["against"], prompts) if "against" in arms else [],
    )


def probe(found: Fitted, lane: str, evaluation: np.ndarray, prompts: Sequence[Prompt], rate: float) -> Judged:
    """A lane's probe on features (evaluation prompts, features), with the threshold that calibration would choose.

    Args:
        prompts: the calibration prompts.
        rate: the largest share of ordinary calibration prompts that may be flagged.
    """
    try:
        chosen = choose_threshold(found, lane, prompts, rate, None)[0]
        weight, bias, threshold = chosen.weight.astype(float), chosen.bias, chosen.threshold
    except CalibrationError:  # it is certain of too many harmless prompts
        (weight, bias), threshold = found.probes[lane], None
    return probability(evaluation.astype(float), weight, bias), threshold


def words(calibration: Sequence[Prompt], evaluation: Sequence[Prompt], rate: float) -> Judged:
    """A bag of words (TF-IDF) of what is asked: it sees no model, and the words of a picture where they are known."""
    chosen, held_out = best_words(calibration, folds_of(calibration))
    model = bag_of_words(chosen).fit([asked(prompt) for prompt in calibration], labels_and_groups(calibration)[0])
    scores = model.predict_proba([asked(prompt) for prompt in evaluation])[:, 1]  # (prompts,)
    try:
        return scores, threshold_of(held_out, calibration, rate)
    except CalibrationError:  # as above
        return scores, None


def _arms(subject: Subject, answers: dict[str, Answers], judged: dict[str, Judged]) -> dict[str, Arm]:
    own, other = ("without", "with") if subject.sasa["safety_layer"] is None else ("with", "without")
    plain = answering_arm("plain model", answers["plain"], np.zeros(len(subject.evaluation), bool))

    def guarded(title: str, said: Answers, sasa: dict[str, Any]) -> Arm:
        assert said.scores is not None  # it has a gate
        gate = said.are(sasa["refusal_token_ids"]) & (said.scores >= sasa["threshold"])  # (prompts,)
        return answering_arm(title, said, gate, float(sasa["threshold"]))

    against = None if subject.against is None else guarded(subject.beside, answers["against"], subject.against)
    return {
        "plain": plain,
        "patched": guarded(f"patched model (probe {own} projection)", answers["patched"], subject.sasa),
        **({} if against is None else {"against": against}),
        other: fitted_arm(f"probe {other} projection", plain, *judged[other]),
        "words": fitted_arm("words alone", plain, *judged["words"]),
    }


def _table(prompts: Sequence[Prompt], answers: dict[str, Answers], arms: dict[str, Arm]) -> pd.DataFrame:
    names = ("name", "label", "channel", "attack", "category", "prompt", "question")
    table = pd.DataFrame([{name: getattr(prompt, name) for name in names} for prompt in prompts])
    for key, said in answers.items():
        table[f"{key}_answer"] = said.texts
    for key, arm in arms.items():
        table[f"{key}_refused"] = arm.refused
        if arm.scores is not None:
            table[f"{key}_unsafe_probability"] = arm.scores
    return table
