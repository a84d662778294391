"""Ablate attention heads one by one and keep what becomes of the last token's final state.

A head is ablated by zeroing its slice of what enters the attention's output projection, at every token. Ablating a
head of block i leaves the blocks before i as they were, so the main lane runs once per prompt and only blocks i..L-1
run again, on what entered block i. One prompt is repeated in a batch, and each row ablates another head: no row is
padded, every family's masks and positions have the right shape, and the picture goes through the vision tower with
the main lane alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from sasa_export.errors import LocateError
from sasa_export.prompts.prompt import Prompt
from sasa_export.research.locate.lane import MainLane, Passed
from sasa_export.research.locate.work import Work
from sasa_export.workers import Workers

OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "wo", "dense")  # as the families of transformers name them


class Heads:
    """The attention heads of a model's blocks, and how to silence them row by row."""

    def __init__(self, lane: MainLane, most_at_once: int = 16) -> None:
        """LocateError where the model's attention is not built in the way that is needed."""
        self.count = int(lane.model.config.get_text_config(decoder=True).num_attention_heads)
        self.at_once = min(self.count, most_at_once)  # rows of a batch, each without another head
        self.projections = [_output_projection(lane.model.get_submodule(path), path) for path in lane.modules]
        if lane.graph.of("between"):
            raise LocateError(
                "this model adds to the hidden state between blocks, so no stretch of them can be run again on its "
                "own. Leave the ablation out: --ablation-prompts 0."
            )
        for path, projection in zip(lane.modules, self.projections, strict=True):
            if projection.in_features % self.count:
                raise LocateError(
                    f"{path} feeds {projection.in_features} features of {self.count} heads into its output projection, "
                    "which is no whole number a head. Leave the ablation out: --ablation-prompts 0."
                )

    @contextmanager
    def silenced(self, block: int, heads: Sequence[int | None]) -> Any:
        """While the context lasts, row r of a batch runs without head `heads[r]` of the block (None: with all)."""
        projection = self.projections[block]
        size = projection.in_features // self.count
        kept = torch.ones(len(heads), 1, projection.in_features)  # (rows, 1, heads * size)
        for row, head in enumerate(heads):
            if head is not None:
                kept[row, :, head * size : (head + 1) * size] = 0.0

        def silence(module: nn.Module, args: tuple) -> tuple:
            return (args[0] * kept.to(args[0]), *args[1:])  # (rows, tokens, heads * size)

        handle = projection.register_forward_pre_hook(silence)
        try:
            yield
        finally:
            handle.remove()


def run_ablation(
    lane: MainLane,
    heads: Heads,
    prompts: Sequence[Prompt],
    rows: Sequence[int],
    blocks: Sequence[int],
    work: Work,
    workers: Workers,
    advance: Callable[[int], None],
) -> None:
    """Ablate every head of `blocks` on the prompts numbered `rows`; `advance` counts the blocks done on each prompt.

    Leaves in the work folder, for each prompt, the final state with all heads (hidden,), and for each block those
    with one head less (heads, hidden), float32.
    """

    def run(row: int) -> None:
        passed: Passed | None = None
        for block in blocks:
            if not work.has(ablated(row, block)):
                if passed is None:
                    passed = lane.run([prompts[row]] * heads.at_once)
                    final = passed.last(passed.output(len(lane.modules) - 1))  # (rows, hidden)
                    work.put(intact(row), lane.normed(final)[0].float().cpu().numpy())
                work.put(ablated(row, block), _without_each(lane, heads, passed, block))
            if workers.leads:
                advance(1)

    workers.spread(rows, run)


def _without_each(lane: MainLane, heads: Heads, passed: Passed, block: int) -> np.ndarray:
    """The final state of one prompt without each head of a block in turn: (heads, hidden), float32."""
    states = []
    for first in range(0, heads.count, heads.at_once):
        chunk = list(range(first, min(first + heads.at_once, heads.count)))
        with heads.silenced(block, [*chunk, *[None] * (heads.at_once - len(chunk))]):
            states.append(lane.again(passed, block)[: len(chunk)].float().cpu().numpy())  # (chunk, hidden)
    return np.concatenate(states)


def intact(row: int) -> str:
    return f"heads-{row:05d}-all"


def ablated(row: int, block: int) -> str:
    return f"heads-{row:05d}-block-{block:03d}"


def _output_projection(block: nn.Module, path: str) -> nn.Linear:
    """The linear layer through which a block's attention leaves."""
    found = [
        module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
        and name.split(".")[-1] in OUTPUT_PROJECTIONS
        and ("attn" in name or "attention" in name)
    ]
    if len(found) != 1:
        raise LocateError(
            f"{path} has {len(found)} linear layers that could be its attention's output projection "
            f"({', '.join(OUTPUT_PROJECTIONS)}), so its heads cannot be ablated. Leave the ablation out: "
            "--ablation-prompts 0."
        )
    return found[0]
