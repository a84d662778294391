"""One pass of the main lane over a list of prompts, and behind each batch the second lanes of every pair of layers.

A batch's hidden states stay in memory while it is worked on; what is kept is small: the last token's state and its
five likeliest tokens behind every block, and one state of each second lane.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from sasa_export.graph import LayerGraph
from sasa_export.probe.features import batches
from sasa_export.prompts.prompt import Prompt
from sasa_export.research.locate.lane import Batch, MainLane
from sasa_export.research.locate.pairs import Pair
from sasa_export.research.work import Work
from sasa_export.workers import workers

LIKELIEST = 5  # tokens that the logit lens looks at


class Passes:
    """A list of prompts, run batch by batch; what is left of it lies in the work folder under `kind`."""

    def __init__(self, work: Work, kind: str, prompts: Sequence[Prompt], batch_size: int) -> None:
        self.work, self.kind, self.prompts = work, kind, prompts
        self.batches = list(batches(prompts, batch_size))  # row numbers

    def run(self, lane: MainLane, lanes: Mapping[Pair, LayerGraph], advance: Callable[[int], None]) -> None:
        """Run what is not there yet, in as many processes as there are; `advance` counts batches."""

        def run(number: int) -> None:
            missing = [pair for pair in lanes if not self.work.has(self._file(number, second_lane(pair)))]
            # The states come last, so that where they are the rest of the main lane is.
            if not missing and self.work.has(self._file(number, "states")):
                return
            batch = lane.run([self.prompts[row] for row in self.batches[number]])
            for pair in missing:
                state = lane.second(batch, lanes[pair])  # (rows, hidden)
                self.work.put(self._file(number, second_lane(pair)), state.float().cpu().numpy())
            for name, array in _of_main_lane(lane, batch):
                self.work.put(self._file(number, name), array)

        workers().spread(range(len(self.batches)), run, lambda number: advance(1))

    def read(self, name: str, block: int | None = None) -> np.ndarray:
        """What the passes left, in the prompts' order.

        Args:
            name: `states`, the last token's behind each block, (prompts, blocks, hidden), float32; `tokens`, the
                likeliest behind each block, (prompts, blocks, 5); `plain`, the main lane's normed state, and
                `second_lane(pair)`, that of a second lane, (prompts, hidden), float32.
            block: of `states`, those behind this block alone, (prompts, hidden).
        """
        parts = [self.work.get(self._file(number, name)) for number in range(len(self.batches))]
        found = np.concatenate([part if block is None else part[:, block] for part in parts])
        return found[np.argsort([row for rows in self.batches for row in rows])]

    def _file(self, number: int, name: str) -> str:
        return f"{self.kind}-{number:05d}-{name}"


def second_lane(pair: Pair) -> str:
    """The name that a pair's second lane goes by in `Passes.read`."""
    return f"lane-{pair[0]}-{pair[1]}"


@torch.no_grad()
def _of_main_lane(lane: MainLane, batch: Batch) -> Iterator[tuple[str, np.ndarray]]:
    states = lane.states(batch)
    normed = [lane.normed(state) for state in states]  # (rows, hidden) each
    tokens = [lane.head(state).topk(LIKELIEST).indices.cpu() for state in normed]  # (rows, 5) each
    yield "tokens", torch.stack(tokens, 1).numpy().astype(np.int32)
    yield "plain", normed[-1].float().cpu().numpy()
    yield "states", torch.stack([state.float().cpu() for state in states], 1).numpy()
