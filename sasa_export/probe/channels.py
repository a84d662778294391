"""Limit over-refusal equally for text, pictures and long text, with one threshold.

Pictures that a model hardly reads, and long text, have noisier scores than short text. A threshold high enough for them
would let harmful short text pass. The scores of pictures and long text are lowered by offsets instead. The offsets are
folded into the probe, whose features show which prompts have pictures or long text.
"""

from collections.abc import Sequence

import numpy as np

from sasa_export.probe.fit import threshold_of
from sasa_export.prompts.prompt import Prompt

CHANNELS = ("text", "picture")
MARKS = 2  # a picture, long text
LONG = 60  # a conversation of this many words or more is long
PENALTY = 1.0  # alpha of the ridge regression
FARTHEST = 1e-9  # least distance of scores from 0 and 1, which keeps logits finite

Linear = tuple[np.ndarray, float]  # weight (features,) and bias
Detector = tuple[np.ndarray, np.ndarray]  # weight (MARKS, features) and bias (MARKS,)


def marks(prompts: Sequence[Prompt]) -> np.ndarray:
    """Return whether each prompt has a picture, and whether it is long: (prompts, MARKS), bool."""
    texts = (" ".join([*(text for _, text in prompt.before), prompt.prompt]) for prompt in prompts)
    long = [len(text.split()) >= LONG for text in texts]
    return np.array([(prompt.channel == "picture", it) for prompt, it in zip(prompts, long, strict=True)])


def detector(states: np.ndarray, prompts: Sequence[Prompt]) -> Detector:
    """Return a ridge regression on states (prompts, features): target 1 for prompts with a mark, 0 for prompts without.

    It is zero for a mark that all prompts have, or that no prompt has.
    """
    from sklearn.linear_model import Ridge

    marked = marks(prompts).astype(float)  # (prompts, MARKS)
    model, varies = Ridge(alpha=PENALTY).fit(states, marked), marked.min(0) < marked.max(0)
    return model.coef_ * varies[:, None], model.intercept_ * varies


def lowered(scores: np.ndarray, detected: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Return P(unsafe), (prompts,), with each prompt's logit lowered by the offsets `by` (MARKS,) of its marks.

    Args: detected: the outputs of `detector`, (prompts, MARKS), which scale the offsets.
    """
    from scipy.special import expit, logit

    if not by.any():
        return scores
    return expit(logit(np.clip(scores, FARTHEST, 1 - FARTHEST)) - detected @ by)


def offsets(scores: np.ndarray, prompts: Sequence[Prompt], rate: float) -> np.ndarray:
    """Return by how many logits the threshold of prompts with a single mark exceeds that without marks, (MARKS,).

    An offset is 0 where either threshold would rest on too few prompts. Args: as for `threshold_of`.
    """
    from scipy.special import logit

    marked, by = marks(prompts), np.zeros(MARKS)  # (prompts, MARKS)
    plain = _limit(scores, prompts, marked.sum(1) == 0, rate)
    for mark in range(MARKS):
        limit = _limit(scores, prompts, marked[:, mark] & (marked.sum(1) == 1), rate)
        if limit is not None and plain is not None:
            by[mark] = logit(limit) - logit(plain)
    return by


def _limit(scores: np.ndarray, prompts: Sequence[Prompt], of: np.ndarray, rate: float) -> float | None:
    """Return the threshold for the prompts in `of` (prompts,), bool. None where too few of them are ordinary."""
    rows = np.flatnonzero(of)
    some = [prompts[int(row)] for row in rows]
    if rate * sum(prompt.label == 0 and not prompt.borderline for prompt in some) < 1:
        return None
    return threshold_of(scores[rows], some, rate)
