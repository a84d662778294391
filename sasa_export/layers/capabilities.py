"""Measure three capabilities behind each block: safety perception, semantic understanding and linguistic expression.

**Safety perception** is how well a linear classifier separates harmful from harmless prompts.

**Semantic understanding** is how similar a request's state is when asked with a picture and when asked as text. For
request r, take the last token's state in three prompts: b_r with the picture and its text, t_r as text alone (text-only
control), and i_r with the picture alone (image-dominant control). Most of a state is common to all prompts. Each kind
is therefore centred on its mean over the requests. The alignment of a block is

    mean over r of cos(b_r - mean(b), t_r - mean(t)).

It is 0 if the block does not distinguish this request from the rest, and 1 if picture and text give the same state.
The same formula with i_r shows how far the picture determines the state.

**Linguistic expression** is how far hidden states decode to words (logit lens). The final norm and the head are applied
to the last token's state behind each block. A token is *readable* if it decodes to a word piece: two or more letters of
any script, single apostrophes or hyphens between letters, and surrounding space. Byte fragments, punctuation, digits,
single letters and control tokens are not readable. Many tokens of a vocabulary are readable, so the readable share of
the whole vocabulary is reported beside the curve as the chance level.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sasa_export.probe.folds import FOLDS
from sasa_export.probe.intervals import Comparable, auc_of, mean_of
from sasa_export.probe.work import Results
from sasa_export.prompts.shares import labels_and_groups
from sasa_export.report import Silent

SEPARATING = 1e-3  # C, the inverse strength of regularization, for features of unit variance
CONTROLS = ("text_only", "image_dominant")
WORD = re.compile(r"[^\W\d_](?:['’-]?[^\W\d_])+")
LEAST_RISE = 0.1  # a curve that rises less has no onset


def decision_values(states: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return cross-validated decision values (prompts,) of a logistic regression on states (prompts, hidden).

    Features are scaled to unit variance within each fold, because a few dimensions of a residual stream exceed the
    rest by orders of magnitude. A group stays in one fold.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=SEPARATING, class_weight="balanced", max_iter=500))
    folds = GroupKFold(min(FOLDS, len(set(groups))))
    states = states.astype(np.float64)
    return cross_val_predict(model, states, labels, groups=groups, cv=folds, method="decision_function")


def separability(results: Results, blocks: int, report: Silent) -> dict[str, list[Comparable]]:
    """Return the AUC behind each block, for "all" prompts and for each channel (text, picture) with both labels.

    If all prompts have one channel, the only key is "all".
    """
    labels, groups = labels_and_groups(results.prompts)
    channels = np.array([prompt.channel for prompt in results.prompts])
    rows = {channel: channels == channel for channel in sorted(set(channels)) if len(set(channels)) > 1}
    rows = {channel: of for channel, of in rows.items() if len(set(labels[of])) == 2}
    rows["all"] = np.full(len(labels), True)
    curves: dict[str, list[Comparable]] = {name: [] for name in rows}
    with report.bar(blocks, "separate") as advance:
        for block in range(blocks):
            scores = decision_values(results.read("states", block), labels, groups)  # (prompts,)
            for name, chosen in rows.items():
                curves[name].append(auc_of(scores[chosen], labels[chosen], groups[chosen]))
            advance(1)
    return curves


def understanding(results: Results, blocks: int) -> dict[str, list[Comparable]] | None:
    """Return each block's alignment with both controls, from a run on `controls(...)`. None for under two requests."""
    groups = np.array([prompt.group for prompt in results.prompts[::3]])
    if len(groups) < 2:
        return None
    states = (results.read("states", block).reshape(len(groups), 3, -1) for block in range(blocks))
    alignments = [alignment(of, groups) for of in states]
    return {name: [block[name] for block in alignments] for name in CONTROLS}


def alignment(states: np.ndarray, groups: np.ndarray) -> dict[str, Comparable]:
    """Return a block's alignment with both controls. states: (requests, 3, hidden), in the order of `controls`."""
    from sklearn.preprocessing import normalize

    both, *others = (normalize(centred(kind)) for kind in states.transpose(1, 0, 2))  # (requests, hidden) each
    return {name: mean_of((both * other).sum(1), groups) for name, other in zip(CONTROLS, others, strict=True)}


def centred(states: np.ndarray) -> np.ndarray:
    """Return states (requests, hidden) minus their mean. Rows within rounding error of the mean become zero."""
    states = states.astype(np.float64)
    left = states - states.mean(0)  # (requests, hidden)
    size = np.linalg.norm(states, axis=1, keepdims=True)  # (requests, 1)
    return np.where(np.linalg.norm(left, axis=1, keepdims=True) > 1e-5 * size, left, 0.0)


@dataclass(frozen=True)
class Expression:
    """The share of readable tokens among the five likeliest behind each block (`readable`). `chance` is the readable
    share of the vocabulary, `onset` the block where words begin, or None."""

    readable: list[float]
    chance: float
    onset: int | None


def expression(tokens: np.ndarray, vocabulary: Sequence[str]) -> Expression:
    """Return the curve from the likeliest tokens (prompts, blocks, 5) and the texts of all tokens."""
    readable = np.array([is_readable(text) for text in vocabulary])  # (vocabulary,)
    share = readable[tokens].mean((0, 2)).tolist()  # (blocks,)
    known = sum(bool(text) for text in vocabulary)
    return Expression(share, float(readable.sum() / max(known, 1)), onset(share))


def onset(readable: Sequence[float]) -> int | None:
    """Return the first block where the readable share has made half of its rise from its lowest to its last value.

    None if the rise is less than `LEAST_RISE`.
    """
    lowest = int(np.argmin(readable))
    rise = readable[-1] - readable[lowest]
    if rise < LEAST_RISE:
        return None
    half = readable[lowest] + rise / 2
    return next(block for block in range(lowest, len(readable)) if readable[block] >= half)


def is_readable(text: str) -> bool:
    """Return whether a decoded token is a word or a piece of one."""
    return WORD.fullmatch(text.strip()) is not None


def token_texts(tokenizer: Any, size: int) -> list[str]:
    """Return the text of each of `size` tokens. Control tokens, and numbers unknown to the tokenizer, are empty."""
    special = set(tokenizer.all_special_ids)
    texts = tokenizer.batch_decode([[number] for number in range(min(size, len(tokenizer)))])
    texts = ["" if number in special else text for number, text in enumerate(texts)]
    return texts + [""] * (size - len(texts))
