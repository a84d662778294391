"""States and prompts that tests of the calibration share."""

from typing import Any

import numpy as np

from sasa_export.prompts.prompt import Prompt


def samples(count: int, hidden: int, *, seed: int = 0, gap: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Random states (count, hidden) whose mean depends on their label (count,) by `gap`."""
    draw = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    direction = draw.normal(size=hidden)
    direction /= np.linalg.norm(direction)
    return draw.normal(size=(count, hidden)) + gap * (labels[:, None] - 0.5) * direction, labels


def prompts_of(labels: Any, channels: str = "text") -> list[Prompt]:
    """Prompts with these labels; `channels` is one name for all, or a letter (t, p) for each."""
    names = {"t": "text", "p": "picture"}
    kinds = [channels] * len(labels) if channels in names.values() else [names[letter] for letter in channels]
    return [
        Prompt(f"prompt {n}", "words", int(label), f"pair {n // 2}", kind, "none")
        for n, (label, kind) in enumerate(zip(labels, kinds, strict=True))
    ]
