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

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sasa_export.research.locate.interval import Estimate, mean_of
from sasa_export.research.locate.passes import Passes


@dataclass(frozen=True)
class Alignment:
    """Alignment of the picture's state with either control, behind each block, and the cosines without the means."""

    requests: int
    text_only: list[Estimate]
    image_dominant: list[Estimate]
    raw_text_only: list[float]
    raw_image_dominant: list[float]


def understanding(passes: Passes, blocks: int) -> Alignment | None:
    """Alignment behind each block, from passes over `controls(...)`; None where there are fewer than two requests."""
    groups = np.array([prompt.group for prompt in passes.prompts[::3]])
    if len(groups) < 2:
        return None
    return alignment([passes.read("states", block).reshape(len(groups), 3, -1) for block in range(blocks)], groups)


def alignment(states: Sequence[np.ndarray], groups: np.ndarray) -> Alignment:
    """From each block's states (requests, 3, hidden): picture with text, text-only and image-dominant control."""
    found = Alignment(len(groups), [], [], [], [])
    for block in states:
        both, text, image = block.transpose(1, 0, 2)  # (requests, hidden) each
        found.text_only.append(mean_of(cosines(centred(both), centred(text)), groups))
        found.image_dominant.append(mean_of(cosines(centred(both), centred(image)), groups))
        found.raw_text_only.append(float(cosines(both, text).mean()))
        found.raw_image_dominant.append(float(cosines(both, image).mean()))
    return found


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Row by row cosine of two arrays (requests, hidden): (requests,); 0 where a row is zero."""
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)  # (requests,)
    inner = (first * second).sum(1)  # (requests,)
    return np.divide(inner, lengths, out=np.zeros_like(inner), where=lengths > 0)


def centred(states: np.ndarray) -> np.ndarray:
    """States (requests, hidden) less their mean; what is no more than rounding becomes zero."""
    states = states.astype(np.float64)
    left = states - states.mean(0)  # (requests, hidden)
    size = np.linalg.norm(states, axis=1, keepdims=True)  # (requests, 1)
    return np.where(np.linalg.norm(left, axis=1, keepdims=True) > 1e-5 * size, left, 0.0)
