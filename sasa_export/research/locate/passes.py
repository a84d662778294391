"""One pass of the main lane over all prompts, and behind each batch the second lanes of every pair of layers.

A batch's hidden states stay in memory while it is worked on; what is kept is small: the last token's state and its
five likeliest words behind every block, and one state of each second lane.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sasa_export.graph.rewrite import LaneSettings, rewrite_lane
from sasa_export.probe.features import batches
from sasa_export.prompts.prompt import Prompt
from sasa_export.research.locate.lane import MainLane, Passed
from sasa_export.research.locate.pairs import Pair
from sasa_export.research.locate.work import Work
from sasa_export.workers import Workers

WORDS = 5  # likeliest tokens that the logit lens looks at


@dataclass(frozen=True)
class Lanes:
    """What the passes left behind for one list of prompts, read from the work folder piece by piece."""

    work: Work
    kind: str
    rows: tuple[tuple[int, ...], ...]  # of each batch

    def states(self, block: int) -> np.ndarray:
        """The last token's state behind a block, (prompts, hidden), float32."""
        return self._gathered(lambda batch: self.work.get(f"{batch}-states")[:, block])

    def words(self) -> np.ndarray:
        """The token numbers that the logit lens ranks first, (prompts, blocks, 5)."""
        return self._gathered(lambda batch: self.work.get(f"{batch}-words"))

    def plain(self) -> np.ndarray:
        """The main lane's normed state, (prompts, hidden), float32: what a probe without projection reads."""
        return self._gathered(lambda batch: self.work.get(f"{batch}-plain"))

    def projected(self, pair: Pair) -> np.ndarray:
        """The normed state of a pair's second lane, (prompts, hidden), float32."""
        return self._gathered(lambda batch: self.work.get(_name(batch, pair)))

    def _gathered(self, read: Callable[[str], np.ndarray]) -> np.ndarray:
        parts = [read(_batch(self.kind, number)) for number in range(len(self.rows))]
        order = np.argsort([row for rows in self.rows for row in rows])
        return np.concatenate(parts)[order]


def run_passes(
    lane: MainLane,
    prompts: Sequence[Prompt],
    pairs: Sequence[Pair],
    work: Work,
    workers: Workers,
    *,
    kind: str,
    batch_size: int,
    epsilon: float,
    softcap: float | None,
    advance: Callable[[int], None],
) -> Lanes:
    """Run what is not yet in the work folder. `kind` names this list of prompts there; `advance` counts batches."""
    rows = tuple(tuple(batch) for batch in batches(prompts, batch_size))
    lanes = {pair: rewrite_lane(lane.graph, LaneSettings(*pair, epsilon, softcap)) for pair in pairs}

    def run(number: int) -> None:
        batch = _batch(kind, number)
        missing = [pair for pair in pairs if not work.has(_name(batch, pair))]
        # The states come last, so that where they are the rest of the main lane is.
        if not missing and work.has(f"{batch}-states"):
            return
        passed = lane.run([prompts[row] for row in rows[number]])
        for pair in missing:
            work.put(_name(batch, pair), lane.second(passed, lanes[pair]).float().cpu().numpy())
        for name, array in _of_main_lane(lane, passed):
            work.put(f"{batch}-{name}", array)

    workers.spread(range(len(rows)), run, lambda number: advance(1))
    return Lanes(work, kind, rows)


@torch.no_grad()
def _of_main_lane(lane: MainLane, passed: Passed) -> Iterator[tuple[str, np.ndarray]]:
    states, words = [], []
    for block in range(len(lane.modules)):
        state = passed.last(passed.output(block))  # (rows, hidden)
        normed = lane.normed(state)  # (rows, hidden)
        words.append(lane.head(normed).topk(WORDS).indices.cpu())  # (rows, 5)
        states.append(state.float().cpu())
    yield "words", torch.stack(words, 1).numpy().astype(np.int32)
    yield "plain", normed.float().cpu().numpy()
    yield "states", torch.stack(states, 1).numpy()


def _batch(kind: str, number: int) -> str:
    return f"{kind}-{number:05d}"


def _name(batch: str, pair: Pair) -> str:
    return f"{batch}-lane-{pair[0]}-{pair[1]}"
