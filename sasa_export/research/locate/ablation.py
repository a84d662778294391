"""Run prompts without each attention head in turn and keep the last token's final state.

A head is ablated by zeroing its slice of what enters the attention's output projection, at every token. Ablating a
head of block i leaves the blocks before i as they were, so the main lane runs once per prompt and only blocks i..L-1
run again, on what entered block i. One prompt is repeated in a batch, and each row ablates another head: no row is
padded, every family's masks and positions have the right shape, and the picture goes through the vision tower with
the main lane alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from sasa_export.errors import LocateError
from sasa_export.layers.heads import INTACT, without
from sasa_export.layers.lane import Batch, MainLane
from sasa_export.probe.work import Results, Work
from sasa_export.prompts.prompt import Prompt
from sasa_export.prompts.shares import spaced
from sasa_export.report import Silent

OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "wo", "dense")  # as the families of transformers name them


def ablated_on(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Up to `count` prompts of either label, evenly spaced.

    Both labels get as many of each channel, or a head that matters to pictures would pass for one that matters to
    whichever label has more of them.
    """
    held: dict[str, dict[int, list[int]]] = defaultdict(lambda: {1: [], 0: []})
    for row, prompt in enumerate(prompts):
        held[prompt.channel][prompt.label].append(row)
    most = {channel: min(len(rows[1]), len(rows[0])) for channel, rows in held.items()}
    shared = sorted((channel for channel in most if most[channel]), key=lambda channel: (most[channel], channel))
    if not shared:
        raise LocateError(
            "no kind of prompt (text, picture) comes with both labels, so that what heads do to harmful prompts cannot "
            "be told from what they do to that kind. Leave the ablation out: --ablation-prompts 0."
        )
    chosen: list[int] = []
    for place, channel in enumerate(shared):
        share = min(most[channel], (count - len(chosen) // 2) // (len(shared) - place))
        for rows in held[channel].values():
            chosen += spaced(rows, share)
    return [prompts[row] for row in sorted(chosen)]


def ablate(
    lane: MainLane, prompts: Sequence[Prompt], blocks: Sequence[int], work: Work, report: Silent, *, at_once: int
) -> Results:
    """Run the prompts with all heads, and without each head of `blocks` in turn, so many heads at a time.

    Returns the last token's final states, float32: INTACT (prompts, hidden), and for each block `without(block)`
    (prompts, heads, hidden). LocateError where the model's attention is not built in the way that is needed.
    """
    heads = Heads(lane, at_once)

    def compute(one: list[Prompt], missing: list[str]) -> Iterator[tuple[str, np.ndarray]]:
        batch = lane.run(one * heads.at_once)
        if INTACT in missing:
            yield INTACT, lane.normed(lane.states(batch)[-1])[:1].float().cpu().numpy()  # (1, hidden)
        for block in blocks:
            if without(block) in missing:
                yield without(block), heads.without_each(batch, block)[None]  # (1, heads, hidden)

    results = Results(work, "ablate", prompts, 1)
    results.fill([INTACT, *map(without, blocks)], compute, report)
    return results


class Heads:
    """The attention heads of a model's blocks, and how to silence them row by row."""

    def __init__(self, lane: MainLane, at_once: int = 16) -> None:
        self.lane = lane
        self.count = int(lane.model.config.get_text_config(decoder=True).num_attention_heads)
        self.at_once = min(self.count, at_once)  # rows of a batch, each without another head
        if lane.graph.of("between"):
            raise _impossible("this model adds to the hidden state between blocks, so they cannot be run again alone")
        self.projections = [_output_projection(lane.model.get_submodule(path), path) for path in lane.blocks]

    def without_each(self, batch: Batch, block: int) -> np.ndarray:
        """The final state of one prompt without each head of a block in turn: (heads, hidden), float32."""
        states = []
        for first in range(0, self.count, self.at_once):
            chunk = list(range(first, min(first + self.at_once, self.count)))
            with self.silenced(block, [*chunk, *[None] * (self.at_once - len(chunk))]):
                states.append(self.lane.again(batch, block)[: len(chunk)].float().cpu().numpy())  # (chunk, hidden)
        return np.concatenate(states)

    @contextmanager
    def silenced(self, block: int, heads: Sequence[int | None]) -> Iterator[None]:
        """While the context lasts, row r of a batch runs without head `heads[r]` of the block (None: with all)."""
        projection = self.projections[block]
        kept = torch.ones(len(heads), 1, projection.in_features)  # (rows, 1, heads * size)
        slices = kept.view(len(heads), self.count, -1)  # (rows, heads, size), of the same memory
        for row, head in enumerate(heads):
            if head is not None:
                slices[row, head] = 0.0

        def silence(module: nn.Module, args: tuple) -> tuple:
            return (args[0] * kept.to(args[0]), *args[1:])  # (rows, tokens, heads * size)

        handle = projection.register_forward_pre_hook(silence)
        try:
            yield
        finally:
            handle.remove()


def _output_projection(block: nn.Module, path: str) -> nn.Linear:
    """The linear layer through which a block's attention leaves."""
    found = [
        module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[-1] in OUTPUT_PROJECTIONS
        if "attn" in name or "attention" in name
    ]
    if len(found) != 1:
        raise _impossible(
            f"{path} has {len(found)} linear layers that could be its attention's output projection "
            f"({', '.join(OUTPUT_PROJECTIONS)})"
        )
    return found[0]


def _impossible(why: str) -> LocateError:
    return LocateError(f"heads cannot be ablated: {why}. Leave the ablation out: --ablation-prompts 0.")
