"""The arms that are compared: models that answered, and detectors that would refuse what they flag."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sasa_export.prompts import asked
from sasa_export.prompts.prompt import Prompt
from sasa_export.research.evaluate.judge import Judge, is_refusal


@dataclass(frozen=True)
class Answers:
    """What a model said to all prompts: `tokens` (prompts, longest), -1 behind the end, and their `texts`; `scores`
    (prompts,), P(unsafe), None of a model without a gate."""

    tokens: np.ndarray
    texts: list[str]
    scores: np.ndarray | None = None

    def are(self, tokens: Sequence[int]) -> np.ndarray:
        """Is each answer these tokens, or as many of them as there was room for? (prompts,), bool."""
        wanted = np.full(self.tokens.shape[1], -1)  # (longest,)
        wanted[: len(tokens)] = tokens[: len(wanted)]
        return (self.tokens == wanted).all(1)


@dataclass(frozen=True)
class Arm:
    """One way of answering, over all prompts.

    Attributes:
        refused: (prompts,), bool: the answer is a refusal, by the gate or in the model's own words.
        complied: (prompts,), bool: the further judge says that the answer complies; None without one.
        scores: (prompts,), P(unsafe); None where nothing detects.
        threshold: from which on a prompt is flagged; None where there is none.
    """

    title: str
    refused: np.ndarray
    complied: np.ndarray | None = None
    scores: np.ndarray | None = None
    threshold: float | None = None

    @property
    def flagged(self) -> np.ndarray | None:
        """(prompts,), bool: the verdict is harmful."""
        return None if self.scores is None or self.threshold is None else self.scores >= self.threshold


def answering_arm(
    title: str,
    answers: Answers,
    gate: np.ndarray,
    prompts: Sequence[Prompt],
    judge: Judge | None,
    threshold: float | None = None,
) -> Arm:
    """A model with the answers that it gave; `gate` (prompts,), bool: they are the refusal of its gate.

    The judge is asked about the answers to harmful prompts.
    """
    refused, complied = gate | np.array([is_refusal(text) for text in answers.texts]), None
    if judge is not None:
        rows = zip(prompts, answers.texts, gate, strict=True)
        complied = np.array([bool(p.label and not no and judge(asked(p), text)) for p, text, no in rows])
    return Arm(title, refused, complied, answers.scores, threshold)


def fitted_arm(title: str, plain: Arm, scores: np.ndarray, threshold: float | None) -> Arm:
    """An arm that would refuse what its scores (prompts,) flag, and else give the plain model's answer."""
    flagged = scores >= (np.inf if threshold is None else threshold)
    complied = None if plain.complied is None else plain.complied & ~flagged
    return Arm(title, plain.refused | flagged, complied, scores, threshold)
