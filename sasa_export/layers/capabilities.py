"""The three capabilities behind each block: safety perception, semantic understanding and linguistic expression.

**Safety perception** is how well harmful and harmless prompts can be told apart by a plane.

**Semantic understanding** is where a picture with text comes to mean what the same request means as text. For a request
r let b_r be the last token's state with the picture and its text, t_r that of the request as text alone (text-only
control), and i_r that of the picture with nothing beside it (image-dominant control). Last-token states all look alike
at first sight, because most of each is what every prompt shares; so each kind is taken relative to its own mean over
the requests, and the alignment of a block is

    mean over r of cos(b_r - mean(b), t_r - mean(t)),

0 where the block knows nothing of what this request, of all requests, asks, and 1 where picture and text have become
the same. The same with i_r says how far the picture carries the state.

**Linguistic expression** is where hidden states become words (logit lens). The final norm and the head are applied to
the last token's state behind each block. A token is *readable* where it decodes to letters alone: two or more, of any
script, with at most an apostrophe or a hyphen among them, and space around them. Pieces of bytes, punctuation, digits,
single letters and control tokens are not. Since many tokens of a vocabulary are readable anyway, the share in the whole
vocabulary is given beside the curve: what chance would show.
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

STRENGTH = 1e-3  # the inverse strength of regularization, on features of unit variance
CONTROLS = ("text_only", "image_dominant")
WORD = re.compile(r"[^\W\d_](?:['’-]?[^\W\d_])+")
LEAST_RISE = 0.1  # a curve that rises less than this does not say where words begin


def decision_values(states: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Cross-validated decision values (prompts,) of a logistic regression on states (prompts, hidden).

    Features are scaled to unit variance within each fold, since a few dimensions of a residual stream are larger
    than all others by orders of magnitude. The members of a group stay in one fold.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=500))
    folds = GroupKFold(min(FOLDS, len(set(groups))))
    states = states.astype(np.float64)
    return cross_val_predict(model, states, labels, groups=groups, cv=folds, method="decision_function")


def separability(results: Results, blocks: int, report: Silent) -> dict[str, list[Comparable]]:
    """AUC behind each block, of "all" prompts, and of each channel (text, picture) that has both labels.

    Where all prompts are of one channel, there is "all" alone.
    """
    labels, groups = labels_and_groups(results.prompts)
    channels = np.array([prompt.channel for prompt in results.prompts])
    rows = {"all": np.full(len(labels), True)}
    for channel in sorted(set(channels)) if len(set(channels)) > 1 else ():
        if len(set(labels[channels == channel])) == 2:
            rows[channel] = channels == channel
    curves: dict[str, list[Comparable]] = {name: [] for name in rows}
    with report.bar(blocks, "separate") as advance:
        for block in range(blocks):
            scores = decision_values(results.read("states", block), labels, groups)  # (prompts,)
            for name, chosen in rows.items():
                curves[name].append(auc_of(scores[chosen], labels[chosen], groups[chosen]))
            advance(1)
    return curves


def understanding(results: Results, blocks: int) -> dict[str, list[Comparable]] | None:
    """Alignment behind each block with either control, from a run on `controls(...)`; None for under two requests."""
    groups = np.array([prompt.group for prompt in results.prompts[::3]])
    if len(groups) < 2:
        return None
    states = (results.read("states", block).reshape(len(groups), 3, -1) for block in range(blocks))
    found = [alignment(of, groups) for of in states]
    return {name: [block[name] for block in found] for name in CONTROLS}


def alignment(states: np.ndarray, groups: np.ndarray) -> dict[str, Comparable]:
    """From a block's states (requests, 3, hidden): picture with text, text-only and image-dominant control."""
    from sklearn.preprocessing import normalize

    both, *others = (normalize(centred(kind)) for kind in states.transpose(1, 0, 2))  # (requests, hidden) each
    return {name: mean_of((both * other).sum(1), groups) for name, other in zip(CONTROLS, others, strict=True)}


def centred(states: np.ndarray) -> np.ndarray:
    """States (requests, hidden) less their mean; what is no more than rounding becomes zero."""
    states = states.astype(np.float64)
    left = states - states.mean(0)  # (requests, hidden)
    size = np.linalg.norm(states, axis=1, keepdims=True)  # (requests, 1)
    return np.where(np.linalg.norm(left, axis=1, keepdims=True) > 1e-5 * size, left, 0.0)


@dataclass(frozen=True)
class Expression:
    """Behind each block, the share of readable tokens among the five likeliest; `chance` is the readable share of the
    vocabulary, `onset` the block where words begin."""

    readable: list[float]
    chance: float
    onset: int | None


def expression(tokens: np.ndarray, vocabulary: Sequence[str]) -> Expression:
    """From the likeliest tokens (prompts, blocks, 5) and every token's text."""
    readable = np.array([is_readable(text) for text in vocabulary])  # (vocabulary,)
    share = readable[tokens].mean((0, 2)).tolist()  # (blocks,)
    known = sum(bool(text) for text in vocabulary)
    return Expression(share, float(readable.sum() / max(known, 1)), onset(share))


def onset(readable: Sequence[float]) -> int | None:
    """The first block at which the readable share has made half of its way from its lowest to its last value.

    None where the last block's share is hardly above the lowest.
    """
    lowest = int(np.argmin(readable))
    rise = readable[-1] - readable[lowest]
    if rise < LEAST_RISE:
        return None
    half = readable[lowest] + rise / 2
    return next(block for block in range(lowest, len(readable)) if readable[block] >= half)


def is_readable(text: str) -> bool:
    """Is a decoded token a piece of a word?"""
    return WORD.fullmatch(text.strip()) is not None


def token_texts(tokenizer: Any, size: int) -> list[str]:
    """Every token's text; control tokens, and numbers that the tokenizer does not have, are empty."""
    special = set(tokenizer.all_special_ids)
    texts = tokenizer.batch_decode([[number] for number in range(min(size, len(tokenizer)))])
    found = ["" if number in special else text for number, text in enumerate(texts)]
    return found + [""] * (size - len(found))
