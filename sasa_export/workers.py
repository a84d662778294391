"""Share work among the processes that `accelerate launch` has started; without it, one process does all of it.

What is shared are whole batches, cut in the same way however many processes there are, so that one and several give
the same numbers. Results go back to every process in the order of the batches.
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
    """The processes at work: the number of this one, and of how many. Every process calls the same methods in turn."""

    index: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Does this process write and print?"""
        return self.index == 0

    def device(self, wanted: str) -> str:
        """Where this process runs: `auto` is a device of its own where there are several."""
        if wanted != "auto" or self.count == 1:
            return wanted
        device = _state().device
        return "cpu" if device.type == "cpu" else str(device)  # and not cpu:1, which there is not

    def wait(self) -> None:
        """Go on when every process has come here."""
        if self.count > 1:
            _state().wait_for_everyone()

    def tell(self, value: Item) -> Item:
        """The first process's value, in every process."""
        if self.count == 1:
            return value
        return broadcast_object_list([value])[0]

    def spread(
        self,
        items: Sequence[Item],
        work: Callable[[Item], Result],
        advance: Callable[[Item], None] = lambda item: None,
    ) -> list[Result]:
        """The results of `work` on all items, in their order, in every process.

        This process does every `count`-th item, since neighbours are alike: accelerate's split_between_processes would
        give all long prompts to one. `advance` is called in the first process alone: with each item that it has done,
        and, on the supposition that all are equally fast, with those that the others have done in the meantime.
        """
        mine = []
        for start in range(0, len(items), self.count):
            turn = items[start : start + self.count]
            if self.index < len(turn):
                mine.append(work(turn[self.index]))
            if self.leads:
                for item in turn:
                    advance(item)
        done = gather_object([mine]) if self.count > 1 else [mine]  # of each process
        return [done[row % self.count][row // self.count] for row in range(len(items))]


def workers() -> Workers:
    """The processes of this run: several where a launcher has set WORLD_SIZE."""
    if int(os.environ.get("WORLD_SIZE") or 1) < 2:
        return Workers()
    return Workers(_state().process_index, _state().num_processes)


@cache
def _state() -> Any:
    """accelerate's state of this process, which joins the others."""
    # The others wait while the first process fits, writes and verifies, which may take hours for a large model.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    # Its threads, left to the end of the interpreter, abort the process now and then.
    atexit.register(state.destroy_process_group)
    return state
