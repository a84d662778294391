"""Figures from answers and scores: refusals, the figures of an arm on any part of the prompts, and the changes between
two gates."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sasa_export.probe.intervals import Estimate, auc_of, share

SPLIT = "split"  # attack type: harmful only as text and picture together

# Phrases of refusals. They match anywhere in an answer, in any case and with either apostrophe.
PHRASES = Path(__file__).with_name("refusals.txt").read_text(encoding="utf-8").splitlines()


def is_refusal(answer: str) -> bool:
    """Return whether an answer contains a refusal phrase."""
    plain = " ".join(answer.replace("\u2019", "'").casefold().split())
    return any(phrase in plain for phrase in PHRASES)


@dataclass(frozen=True)
class Answers:
    """A model's answers to all prompts: `tokens` (prompts, longest), -1 after the end, their `texts`, and `scores`
    (prompts,), P(unsafe), NaN for a model without a gate."""

    tokens: np.ndarray
    texts: list[str]
    scores: np.ndarray

    def refused(self) -> np.ndarray:
        """Return whether each answer is a refusal in the model's own words, (prompts,), bool."""
        return np.array([is_refusal(text) for text in self.texts])

    def are(self, tokens: Sequence[int]) -> np.ndarray:
        """Return whether each answer is exactly these tokens, cut to the longest answer, (prompts,), bool."""
        wanted = np.full(self.tokens.shape[1], -1)  # (longest,)
        wanted[: len(tokens)] = tokens[: len(wanted)]
        return (self.tokens == wanted).all(1)


def figures(asked: pd.DataFrame, key: str, threshold: float | None) -> dict[str, Estimate]:
    """Return the figures of an arm on rows of the table of `measure.arms_of`. Undefined figures are left out.

    `attack` is the attack success rate, `over_refusal` the share of harmless prompts whose answer is a refusal.
    `caught` and `false_positives` are the shares of harmful and of harmless prompts that the threshold flags.
    """
    refused, scores = f"{key}_refused", f"{key}_unsafe_probability"
    harmful, harmless = asked[asked.label == 1], asked[asked.label == 0]
    found = {"attack": share(~harmful[refused]), "over_refusal": share(harmless[refused])}
    if threshold is not None:
        flagged = {"caught": harmful[scores] >= threshold, "false_positives": harmless[scores] >= threshold}
        found |= {name: share(rows) for name, rows in flagged.items()}
    known: dict[str, Estimate] = {name: value for name, value in found.items() if value is not None}
    if scores in asked and len(harmful) and len(harmless):
        known["auc"] = auc_of(*(asked[name].to_numpy() for name in (scores, "label", "group")))
    return known


def changes(asked: pd.DataFrame, before: float, after: float) -> list[dict[str, Any]]:
    """Compare the gates of the "patched" and the "against" model, at the thresholds `before` and `after`: on harmful
    and on harmless prompts, in total and for each part.

    In a result, `before` and `after` are the shares that the gates refuse, `now_refused` and `now_allowed` the numbers
    of changed verdicts, and `largest` is the largest change of P(unsafe).
    """
    was, now = asked.patched_unsafe_probability, asked.against_unsafe_probability  # (prompts,) each
    asked = asked.assign(old=was >= before, new=now >= after, moved=(now - was).abs())
    found = []
    for kind, of in {"all": {"all": asked}, **parts(asked)}.items():
        for part, whole in of.items():
            for label in (1, 0):
                rows = whole[whole.label == label]
                if len(rows):
                    found.append({
                        "kind": kind, "part": part, "label": label, "prompts": len(rows), "before": share(rows.old),
                        "after": share(rows.new), "now_refused": int((rows.new & ~rows.old).sum()),
                        "now_allowed": int((rows.old & ~rows.new).sum()), "largest": float(rows.moved.max()),
                    })  # fmt: skip
    return found


def parts(asked: pd.DataFrame) -> dict[str, dict[str, pd.DataFrame]]:
    """Return the rows by channel, setting, attack type, category and data set. Columns with one value are left out.

    Requests that are split between text and picture form a channel of their own.
    """
    kinds = {
        "channel": asked.channel.mask(asked.attack == SPLIT, SPLIT),
        "setting": asked.setting,
        "attack type": asked.attack,
        "category": asked.category,
        "data set": asked.source.replace("", "unnamed"),
    }
    return {kind: dict(iter(asked.groupby(values))) for kind, values in kinds.items() if values.nunique() > 1}
