"""From answers and features to arms, and from arms to all figures of the report.

Two arms are logistic regressions fitted on the calibration prompts: a probe and words alone. As in calibration,
cross-validation chooses their regularization, and the false-positive rate determines their threshold.
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

ASKED = (  # attributes of each prompt
    "name", "label", "channel", "setting", "attack", "category", "prompt", "question", "source", "group",
)  # fmt: skip

Judged = tuple[np.ndarray, float | None]  # P(unsafe) of the evaluation prompts; a threshold, if one keeps the rate


@dataclass(frozen=True)
class Evaluated:
    """All results of an evaluation.

    Attributes:
        subject: the models, prompts and settings.
        answers: the table of `arms_of`.
        arms: title, threshold and figures of each arm over all prompts, by key: plain, patched, against (--against),
            with or without (the kind of probe that the patched model does not have), and words.
        parts: for example `parts["channel"]["text"]`: the number of `prompts`, and the figures of each arm on them.
        gain: differences of AUC. "projection": a probe with projection minus one without, fitted alike; "model": the
            patched model minus words alone.
        identical: the share of allowed harmless prompts with the original's answer, token for token.
        emitted: the share of flagged prompts that are answered with the refusal.
        changes: from the patched model to the --against model, see `arms.changes`. Empty without --against.
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
    """Return all arms and all figures.

    Args:
        answers: those of the "plain", the "patched" and (with --against) the "against" model.
        features: those of the evaluation prompts.
        fitted: probes that are fitted on the calibration prompts.
    """
    calibration, rate = subject.calibration, subject.rate
    judged = {
        "with": probe(fitted, "projected", features.projected, calibration, rate),
        "without": probe(fitted, "plain", features.plain, calibration, rate),
        "words": words(fitted, calibration, subject.evaluation, rate),
    }
    table, arms = arms_of(subject, answers, judged)

    def each(rows: pd.DataFrame) -> dict[str, dict[str, Estimate]]:
        return {key: figures(rows, key, arm["threshold"]) for key, arm in arms.items()}

    overall, (labels, groups) = each(table), labels_and_groups(subject.evaluation)
    auc = {key: auc_of(scores, labels, groups) for key, (scores, _) in judged.items()}
    flagged = table.patched_unsafe_probability.to_numpy() >= subject.gate.threshold  # (prompts,)
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
        emitted=share(answers["patched"].are(subject.gate.refusal_token_ids)[flagged]),
        changes=changes(table, *(arms[key]["threshold"] for key in ("patched", "against"))) if subject.against else [],
    )


def arms_of(
    subject: Subject, answers: dict[str, Answers], judged: dict[str, Judged]
) -> tuple[pd.DataFrame, dict[str, dict[str, Any]]]:
    """Return a table of each arm's results, a row per prompt; and "title" and "threshold" of each arm, by key.

    A row has the prompt, each model's answer (KEY_answer), whether an arm refuses by its gate or in the model's own
    words (KEY_refused), and P(unsafe) of an arm that detects (KEY_unsafe_probability). The models' answers are real.
    The probe and words arms are simulated: refuse if flagged, else the plain model's answer.
    """
    table = pd.DataFrame([{name: getattr(prompt, name) for name in ASKED} for prompt in subject.evaluation])
    table = table.assign(**{f"{key}_answer": said.texts for key, said in answers.items()})
    table["plain_refused"] = answers["plain"].refused()
    arms: dict[str, dict[str, Any]] = {"plain": {"title": "plain model", "threshold": None}}

    def add(key: str, title: str, refused: np.ndarray, scores: np.ndarray, threshold: float | None) -> None:
        arms[key] = {"title": title, "threshold": threshold}
        table[f"{key}_refused"], table[f"{key}_unsafe_probability"] = refused, scores

    own, other = ("without", "with") if subject.gate.safety_layer is None else ("with", "without")
    gates = [("patched", f"patched model (probe {own} projection)", subject.gate)]
    if subject.against is not None:
        gates.append(("against", subject.described()["against"], subject.against))
    for key, title, spec in gates:
        said, at = answers[key], spec.threshold
        gate = said.are(spec.refusal_token_ids) & (said.scores >= at)  # (prompts,)
        add(key, title, said.refused() | gate, said.scores, at)
    for key, title in ((other, f"probe {other} projection"), ("words", "words alone")):
        scores, threshold = judged[key]
        flagged = scores >= (np.inf if threshold is None else threshold)  # (prompts,)
        add(key, title, table["plain_refused"].to_numpy() | flagged, scores, threshold)
    return table, arms


def probe(found: Fitted, lane: str, evaluation: np.ndarray, prompts: Sequence[Prompt], rate: float) -> Judged:
    """Judge features (evaluation prompts, features) by a lane's probe, at the threshold that calibration chooses.

    Args:
        prompts: the calibration prompts.
        rate: the largest share of ordinary calibration prompts that may be flagged.
    """
    (weight, bias), threshold = found.probes[lane], None
    with suppress(CalibrationError):  # no threshold keeps the rate
        chosen = probe_of_lane(found, lane, prompts, rate, None)[0]
        weight, bias, threshold = chosen.weight.astype(float), chosen.bias, chosen.threshold
    return probability(evaluation.astype(float), weight, bias), threshold


def words(found: Fitted, calibration: Sequence[Prompt], evaluation: Sequence[Prompt], rate: float) -> Judged:
    """Judge prompts by a bag of words (TF-IDF), without a model. It reads the words in a picture where known."""
    chosen, held_out = found.words, found.scores.get("words")
    if chosen is None or held_out is None:
        chosen, held_out = best_words(calibration, folds_of(calibration))
    model = bag_of_words(chosen).fit([asked(prompt) for prompt in calibration], labels_and_groups(calibration)[0])
    scores = model.predict_proba([asked(prompt) for prompt in evaluation])[:, 1]  # (prompts,)
    threshold = None
    with suppress(CalibrationError):  # as above
        threshold = threshold_of(held_out, calibration, rate)
    return scores, threshold
