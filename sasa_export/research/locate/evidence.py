"""The evidence that comes from the main lane alone: separability, alignment and expression, block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sasa_export.prompts.prompt import Prompt
from sasa_export.research.locate.alignment import Alignment, alignment
from sasa_export.research.locate.expression import Expression, expression, vocabulary
from sasa_export.research.locate.passes import Lanes
from sasa_export.research.locate.prompts import Control
from sasa_export.research.locate.separability import Separability, scores_of, separability


def perceived(
    lanes: Lanes, prompts: Sequence[Prompt], blocks: int, advance: Callable[[int], None] = lambda count: None
) -> Separability:
    """Separability behind each block."""
    labels = np.array([prompt.label for prompt in prompts])
    groups = [prompt.group for prompt in prompts]
    scores = []
    for block in range(blocks):
        scores.append(scores_of(lanes.states(block), labels, groups))
        advance(1)
    return separability(scores, prompts)


def understood(lanes: Lanes, controls: Sequence[Control], blocks: int) -> Alignment | None:
    """Alignment behind each block; None without controls. `lanes` ran over `flat(controls)`."""
    if len(controls) < 2:
        return None

    def of_block(block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        states = lanes.states(block)
        return states[0::3], states[1::3], states[2::3]

    return alignment([of_block(block) for block in range(blocks)], [control.both.group for control in controls])


def expressed(words: np.ndarray, tokenizer: Any, vocabulary_size: int) -> tuple[Expression, list[str]]:
    """Expression from the ranked tokens (prompts, blocks, 5), and every token's text."""
    pieces = vocabulary(tokenizer, vocabulary_size)
    return expression(words, pieces), pieces


def flat(controls: Sequence[Control]) -> list[Prompt]:
    """Picture prompt, text-only and image-dominant control, in turn."""
    return [prompt for control in controls for prompt in (control.both, control.text, control.image)]
