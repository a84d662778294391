"""Features of both lanes for the arms that are fitted here, batch by batch, resumable and shared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sasa_export.graph import LayerGraph
from sasa_export.probe.features import RECENT, batches, reading
from sasa_export.prompts.prompt import Prompt
from sasa_export.research.locate.work import Work
from sasa_export.workers import Workers


@dataclass(frozen=True)
class Features:
    """Of all prompts, float32: `plain` is the main lane's and `projected` the second lane's (prompts, features),
    `depths` those behind blocks within the second lane (prompts, hidden), by node, and `recent` the mean over the last
    tokens of the second lane (prompts, hidden), where they were asked for."""

    plain: np.ndarray
    projected: np.ndarray
    depths: dict[str, np.ndarray]
    recent: np.ndarray | None = None


def read_features(
    model: Callable[[], Any],
    processor: Any,
    lane: LayerGraph,
    prompts: Sequence[Prompt],
    depths: Sequence[str],
    work: Work,
    kind: str,
    workers: Workers,
    *,
    batch_size: int,
    recent: int = 0,
    advance: Callable[[int], None] = lambda count: None,
) -> Features:
    """Run the lane over all prompts; what the work folder has already is not run again.

    Args:
        depths: nodes of the lane whose values are wanted too.
        recent: how many last tokens to average over; 0 leaves it out.
        kind: names this list of prompts in the work folder.
        advance: called with the number of prompts done since the last call.
    """
    cut = list(batches(prompts, batch_size))
    names = ("plain", "projected", *depths, *([RECENT] if recent else []))

    def run(number: int) -> dict[str, np.ndarray]:
        files = {name: f"{kind}-{number:05d}-{name}" for name in names}
        if not all(work.has(file) for file in files.values()):
            with reading(model(), processor, lane, depths, recent) as read:
                found = read(prompts, cut[number])
            for name, file in files.items():
                work.put(file, {"plain": found.plain, "projected": found.projected, **found.more}[name])
        return {name: np.array(work.get(file)) for name, file in files.items()}

    found = workers.spread(range(len(cut)), run, lambda number: advance(len(cut[number])))
    order = np.argsort([row for rows in cut for row in rows])
    values = {name: np.concatenate([batch[name] for batch in found])[order] for name in names}
    mean = values.pop(RECENT, None)
    return Features(values.pop("plain"), values.pop("projected"), values, mean)
