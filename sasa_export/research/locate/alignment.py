"""Semantic understanding: where a picture with text comes to mean what the same request means as text.

For a request r let b_r be the last token's state with the picture and its text, t_r that of the request as text
alone (text-only control), and i_r that of the picture with nothing beside it (image-dominant control). Last-token
states all look alike at first sight, because most of each is what every prompt shares; so each kind is taken relative
to its own mean over the requests, and the alignment of a block is

    mean over r of cos(b_r - mean(b), t_r - mean(t)),

0 where the block knows nothing of what this request, of all requests, asks, and 1 where picture and text have become
the same. The same with i_r says how far the picture carries the state. `raw` is the cosine without the means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sasa_export.research.locate.interval import Estimate, is_below, mean_of


@dataclass(frozen=True)
class Alignment:
    """Alignment of the image+text state with either control, behind each block."""

    text: tuple[Estimate, ...]
    image: tuple[Estimate, ...]
    raw_text: tuple[float, ...]
    raw_image: tuple[float, ...]
    requests: int

    def blocks_within_noise(self, end: int) -> list[int]:
        """Of blocks 0..end-1, those whose alignment with text is not below the best one's by more than noise."""
        best = max(self.text[:end], key=lambda estimate: estimate.value)
        return [block for block, estimate in enumerate(self.text[:end]) if not is_below(estimate, best, end)]

    def to_json(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "text_only": [estimate.to_json() for estimate in self.text],
            "image_dominant": [estimate.to_json() for estimate in self.image],
            "raw_text_only": [round(value, 4) for value in self.raw_text],
            "raw_image_dominant": [round(value, 4) for value in self.raw_image],
        }


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


def alignment(blocks: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], groups: Sequence[str]) -> Alignment:
    """From each block's states (image+text, text-only, image-dominant), each (requests, hidden)."""
    text, image, raw_text, raw_image = [], [], [], []
    for both, words, picture in blocks:
        text.append(mean_of(cosines(centred(both), centred(words)), groups))
        image.append(mean_of(cosines(centred(both), centred(picture)), groups))
        raw_text.append(float(cosines(both, words).mean()))
        raw_image.append(float(cosines(both, picture).mean()))
    return Alignment(tuple(text), tuple(image), tuple(raw_text), tuple(raw_image), len(groups))
