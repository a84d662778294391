"""What models compute over all prompts, batch by batch: resumable, and shared among processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sasa_export.probe.features import batches
from sasa_export.prompts.prompt import Prompt
from sasa_export.research.locate.work import Work
from sasa_export.workers import Workers


def batched(
    compute: Callable[[list[Prompt]], dict[str, np.ndarray]],
    names: Sequence[str],
    prompts: Sequence[Prompt],
    batch_size: int,
    work: Work,
    kind: str,
    workers: Workers,
    advance: Callable[[int], None],
) -> dict[str, np.ndarray]:
    """Arrays (prompts, ...) of all prompts, in their order, in every process; what is in the work folder is not
    computed again.

    Args:
        compute: from a batch of prompts to arrays (rows, ...) by name.
        names: of the arrays; `kind` names this computation in the work folder.
        advance: called with the number of prompts done since the last call.
    """
    rows = list(batches(prompts, batch_size))

    def run(number: int) -> dict[str, np.ndarray]:
        files = {name: f"{kind}-{number:05d}-{name}" for name in names}
        if not all(work.has(file) for file in files.values()):
            found = compute([prompts[row] for row in rows[number]])
            for name, file in files.items():
                work.put(file, found[name])
        return {name: np.array(work.get(file)) for name, file in files.items()}

    parts = workers.spread(range(len(rows)), run, lambda number: advance(len(rows[number])))
    order = np.argsort([row for batch in rows for row in batch])  # (prompts,)
    return {name: np.concatenate([part[name] for part in parts])[order] for name in names}
