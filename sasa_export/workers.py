"""Share work among the processes that `accelerate launch` has started. Without it, one process does everything.

The processes share whole batches. Batches, and therefore results, do not depend on the number of processes. Every
process receives all results, in the order of the batches.
"""

import atexit
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Workers:
    """The `index` of this process among `count` processes. All must call the same methods in the same order."""

    index: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes and prints: only the first one does."""
        return self.index == 0

    def device(self, wanted: str) -> str:
        """Return the device of this process. With several processes, `auto` gives each one its own device."""
        if wanted != "auto" or self.count == 1:
            return wanted
        device = _state().device
        return "cpu" if device.type == "cpu" else str(device)  # not cpu:1, which does not exist

    def wait(self) -> None:
        """Wait until every process has called this."""
        if self.count > 1:
            _state().wait_for_everyone()

    def tell(self, value: Item) -> Item:
        """Return the first process's value, in every process."""
        if self.count == 1:
            return value
        return broadcast_object_list([value])[0]

    def spread(
        self,
        items: Sequence[Item],
        work: Callable[[Item], Result],
        advance: Callable[[Item], None] = lambda item: None,
    ) -> list[Result]:
        """Return the results of `work` on all items, in their order, in every process.

        Each process takes every `count`-th item. Neighbouring items have similar lengths: accelerate's
        split_between_processes would give all long prompts to one process. Only the first process calls `advance`:
        with each of its items, and with the items that equally fast processes have done by then.
        """
        mine = []
        for start in range(0, len(items), self.count):
            turn = items[start : start + self.count]
            if self.index < len(turn):
                mine.append(work(turn[self.index]))
            if self.leads:
                for item in turn:
                    advance(item)
        done = gather_object([mine]) if self.count > 1 else [mine]  # one list per process
        return [done[row % self.count][row // self.count] for row in range(len(items))]


def workers() -> Workers:
    """Return the processes of this run: several where a launcher has set WORLD_SIZE."""
    if int(os.environ.get("WORLD_SIZE") or 1) < 2:
        return Workers()
    return Workers(_state().process_index, _state().num_processes)


@cache
def _state() -> Any:
    """Return accelerate's state of this process, which joins the process group."""
    # The other processes wait while the first one fits, writes and verifies: hours for a large model.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    # Threads that still run when the interpreter ends sometimes abort the process.
    atexit.register(state.destroy_process_group)
    return state
