"""From answers and features to arms, and from arms to everything that the report says.

Two arms are fitted on the calibration prompts, a probe and words alone: logistic regressions, their strength of
regularization chosen by cross-validation, with the threshold that the false-positive rate allows, as in calibration.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sasa_export.errors import CalibrationError
from sasa_export.probe.calibration import Fitted, probe_of_lane
from sasa_export.probe.features import Features
from sasa_export.probe.fit import bag_of_words, best_words, probability, threshold_of
from sasa_export.probe.folds import folds_of
from sasa_export.probe.intervals import Comparable, Estimate, Share, auc_of, difference, share
from sasa_export.prompts.prompt import Prompt, asked
from sasa_export.prompts.shares import labels_and_groups
from sasa_export.research.evaluate.arms import Answers, changes, figures, parts
from sasa_export.research.evaluate.subject import Subject

ASKED = (  # of each prompt
    "name", "label", "channel", "setting", "attack", "category", "prompt", "question", "source", "group",
)  # fmt: skip

Judged = tuple[np.ndarray, float | None]  # P(unsafe) of the evaluation prompts, and a threshold if one keeps the rate


@dataclass(frozen=True)
class Evaluated:
    """Everything that an evaluation found.

    Attributes:
        subject: what was evaluated, on what, and how it ran.
        answers: the table of `arms_of`.
        arms: title, threshold and figures of each arm over all prompts, by key: plain, patched, against (--against),
            with or without (the probe that the patched model does not have), and words.
        parts: `parts["channel"]["text"]`: the number of `prompts`, and the figures of each arm on them.
        gain: differences of AUC. "projection": a probe with it less one without, both fitted here alike; "model": the
            patched model less words alone.
        identical: harmless prompts that the patched model allows, answered token for token as by the original.
        emitted: flagged prompts that are answered with the refusal.
        changes: from the patched model to that of --against, see `arms.changes`; none without.
    """

    subject: dict[str, Any]
    answers: pd.DataFrame
    arms: dict[str, dict[str, Any]]
    parts: dict[str, dict[str, dict[str, Any]]]
    gain: dict[str, Comparable]
    identical: Share | None
    emitted: Share | None
    changes: list[dict[str, Any]]


def measure(subject: Subject, answers: dict[str, Answers], features: Features, fitted: Fitted) -> Evaluated:
    """All arms and all figures.

    Args:
        answers: of the "plain" and the "patched" model, and of that of --"against".
        features: of the evaluation prompts.
        fitted: probes on the calibration prompts.
    """
    calibration, rate = subject.calibration, subject.rate
    judged = {
        "with": probe(fitted, "projected", features.projected, calibration, rate),
        "without": probe(fitted, "plain", features.plain, calibration, rate),
        "words": words(calibration, subject.evaluation, rate),
    }
    table, arms = arms_of(subject, answers, judged)

    def each(rows: pd.DataFrame) -> dict[str, dict[str, Estimate]]:
        return {key: figures(rows, key, arm["threshold"]) for key, arm in arms.items()}

    overall, (labels, groups) = each(table), labels_and_groups(subject.evaluation)
    auc = {key: auc_of(scores, labels, groups) for key, (scores, _) in judged.items()}
    flagged = table.patched_unsafe_probability.to_numpy() >= subject.sasa["threshold"]  # (prompts,)
    same = (answers["plain"].tokens == answers["patched"].tokens).all(1)  # (prompts,)
    return Evaluated(
        subject=subject.described(),
        answers=table,
        arms={key: {**arm, **overall[key]} for key, arm in arms.items()},
        parts={
            kind: {part: {"prompts": len(rows), **each(rows)} for part, rows in of.items()}
            for kind, of in parts(table).items()
        },
        gain={
            "projection": difference(auc["with"], auc["without"]),
            "model": difference(auc_of(answers["patched"].scores, labels, groups), auc["words"]),
        },
        identical=share(same[(labels == 0) & ~flagged]),
        emitted=share(answers["patched"].are(subject.sasa["refusal_token_ids"])[flagged]),
        changes=changes(table, *(arms[key]["threshold"] for key in ("patched", "against"))) if subject.against else [],
    )


def arms_of(
    subject: Subject, answers: dict[str, Answers], judged: dict[str, Judged]
) -> tuple[pd.DataFrame, dict[str, dict[str, Any]]]:
    """What each arm made of the prompts, a row a prompt; and "title" and "threshold" of each arm, by key.

    A row has what was asked, what each model answered (KEY_answer), whether each arm's answer is a refusal
    (KEY_refused), by the gate or in the model's own words, and P(unsafe) where it detects (KEY_unsafe_probability). A
    model gave its answers; a probe and words would refuse what they flag, and else give the plain model's.
    """
    table = pd.DataFrame([{name: getattr(prompt, name) for name in ASKED} for prompt in subject.evaluation])
    table = table.assign(**{f"{key}_answer": said.texts for key, said in answers.items()})
    table["plain_refused"] = answers["plain"].refused()
    arms: dict[str, dict[str, Any]] = {"plain": {"title": "plain model", "threshold": None}}

    def add(key: str, title: str, refused: np.ndarray, scores: np.ndarray, threshold: float | None) -> None:
        arms[key] = {"title": title, "threshold": threshold}
        table[f"{key}_refused"], table[f"{key}_unsafe_probability"] = refused, scores

    own, other = ("without", "with") if subject.sasa["safety_layer"] is None else ("with", "without")
    gates = [("patched", f"patched model (probe {own} projection)", subject.sasa)]
    if subject.against is not None:
        gates.append(("against", subject.described()["against"], subject.against))
    for key, title, sasa in gates:
        said, at = answers[key], float(sasa["threshold"])
        gate = said.are(sasa["refusal_token_ids"]) & (said.scores >= at)  # (prompts,)
        add(key, title, said.refused() | gate, said.scores, at)
    for key, title in ((other, f"probe {other} projection"), ("words", "words alone")):
        scores, threshold = judged[key]
        flagged = scores >= (np.inf if threshold is None else threshold)  # (prompts,)
        add(key, title, table["plain_refused"].to_numpy() | flagged, scores, threshold)
    return table, arms


def probe(found: Fitted, lane: str, evaluation: np.ndarray, prompts: Sequence[Prompt], rate: float) -> Judged:
    """A lane's probe on features (evaluation prompts, features), with the threshold that calibration would choose.

    Args:
        prompts: the calibration prompts.
        rate: the largest share of ordinary calibration prompts that may be flagged.
    """
    (weight, bias), threshold = found.probes[lane], None
    with suppress(CalibrationError):  # it is certain of too many harmless prompts
        chosen = probe_of_lane(found, lane, prompts, rate, None)[0]
        weight, bias, threshold = chosen.weight.astype(float), chosen.bias, chosen.threshold
    return probability(evaluation.astype(float), weight, bias), threshold


def words(calibration: Sequence[Prompt], evaluation: Sequence[Prompt], rate: float) -> Judged:
    """A bag of words (TF-IDF) of what is asked: it sees no model, and the words of a picture where they are known."""
    chosen, held_out = best_words(calibration, folds_of(calibration))
    model = bag_of_words(chosen).fit([asked(prompt) for prompt in calibration], labels_and_groups(calibration)[0])
    scores = model.predict_proba([asked(prompt) for prompt in evaluation])[:, 1]  # (prompts,)
    threshold = None
    with suppress(CalibrationError):  # as above
        threshold = threshold_of(held_out, calibration, rate)
    return scores, threshold
