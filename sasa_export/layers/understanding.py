"""Semantic understanding: where a picture with text comes to mean what the same request means as text.

For a request r let b_r be the last token's state with the picture and its text, t_r that of the request as text
alone (text-only control), and i_r that of the picture with nothing beside it (image-dominant control). Last-token
states all look alike at first sight, because most of each is what every prompt shares; so each kind is taken relative
to its own mean over the requests, and the alignment of a block is

    mean over r of cos(b_r - mean(b), t_r - mean(t)),

0 where the block knows nothing of what this request, of all requests, asks, and 1 where picture and text have become
the same. The same with i_r says how far the picture carries the state.
"""

from __future__ import annotations

import numpy as np

from sasa_export.probe.intervals import Comparable, mean_of
from sasa_export.probe.work import Results

CONTROLS = ("text_only", "image_dominant")


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
