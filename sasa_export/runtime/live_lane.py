"""Judging every token: the second lane beside the main lane."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from sasa_export.runtime.lane import CACHES, project_taps, replay
from sasa_export.runtime.watch import Recording, current_recording


class LiveLane:
    """The second lane beside the main lane, with keys and values of its own: every token's state at each call.

    Blocks s+1..f run for it once the main lane is through block f; from there on both lanes go through each block
    as one batch, so that its weights are read once, until the block that the probe reads.

    Args:
        model: the guarded model; graph: `config.sasa["graph"]`.
        kept: the lane's cache layers of the tokens before this call, from block s+1 on; empty at the start.
    """

    def __init__(self, model: nn.Module, graph: list[dict[str, Any]], kept: list[Any]) -> None:
        self.model, self.graph = model, graph
        self.paths = [node["module"] for node in graph if node["op"] == "lane_block"]
        self.semantic = [node["module"] for node in graph if node["op"] == "tap"][-1]
        # How many blocks run for this lane alone: those up to f.
        self.own = self.paths.index(self.semantic) + 1 if self.semantic in self.paths else len(self.paths)
        self.layers = dict(zip(self.paths, kept, strict=False))
        self.state: torch.Tensor | None = None  # (batch, tokens, hidden)

    def start(self, seen: Recording) -> None:
        """Project the two taps and run the lane through block f."""
        state = project_taps(self.graph, seen)  # (batch, tokens, hidden)
        unseen = current_recording.set(None)
        try:
            for path in self.paths[: self.own]:
                cache = next(
                    (seen.arguments[path][1][name] for name in CACHES if seen.arguments[path][1].get(name)), None
                )
                own = None if cache is None else _Keys(self, path, cache, both=False)
                state = replay(self.model.get_submodule(path), state, seen.arguments[path], own)
        finally:
            current_recording.reset(unseen)
        self.state = state

    def along(self, run: Callable, path: str, args: tuple, kwargs: dict) -> Any:
        """Run a block on both lanes; returns the main lane's output (batch, tokens, hidden)."""
        hidden = args[0] if args else kwargs["hidden_states"]  # (batch, tokens, hidden)
        assert self.state is not None
        both = torch.cat([hidden, self.state.to(hidden)])  # (2 * batch, tokens, hidden)
        args = (both, *(_twice(value, hidden.shape[0]) for value in args[1:])) if args else ()
        twice = {name: _twice(value, hidden.shape[0]) for name, value in kwargs.items()}
        if not args:
            twice["hidden_states"] = both
        for name in CACHES:
            if kwargs.get(name) is not None:
                twice[name] = _Keys(self, path, kwargs[name], both=True)
        output = run(*args, **twice)
        main, self.state = _halves(output[0] if isinstance(output, tuple) else output)
        return (main, *output[1:]) if isinstance(output, tuple) else main


class _Keys:
    """Stands for the cache within one block: the lane's own keys and values, behind those of the main lane if both."""

    def __init__(self, lane: LiveLane, path: str, cache: Cache, *, both: bool) -> None:
        self.lane, self.path, self.cache, self.both = lane, path, cache, both

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def update(self, keys: torch.Tensor, values: torch.Tensor, index: int, *args: Any, **kwargs: Any) -> Any:
        first: tuple = ()
        if self.both:
            (main_keys, keys), (main_values, values) = _halves(keys), _halves(values)
            first = self.cache.update(main_keys, main_values, index, *args, **kwargs)
        if self.path not in self.lane.layers:
            self.lane.layers[self.path] = _emptied(self.cache.layers[index])
        own = self.lane.layers[self.path].update(keys, values, *args, **kwargs)
        return tuple(torch.cat(pair) for pair in zip(first, own, strict=True)) if self.both else own


def _emptied(layer: Any) -> Any:
    """A cache layer of the same kind, with nothing in it."""
    twin = copy.copy(layer)
    twin.keys = twin.values = None
    twin.is_initialized = False
    for name, value in vars(layer).items():  # lengths that layers count in place must not be shared
        if isinstance(value, torch.Tensor) and name not in ("keys", "values"):
            setattr(twin, name, value.clone())
    twin.reset()
    return twin


def _halves(both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The main lane's rows and the second lane's."""
    batch = both.shape[0] // 2
    return both[:batch], both[batch:]


def _twice(value: Any, batch: int) -> Any:
    """An argument of a block, for two lanes: whatever has a row for each of the batch gets them twice."""
    if isinstance(value, torch.Tensor):
        return torch.cat([value, value]) if value.dim() > 1 and value.shape[0] == batch else value
    if isinstance(value, (tuple, list)):
        return type(value)(_twice(item, batch) for item in value)
    return {name: _twice(item, batch) for name, item in value.items()} if isinstance(value, dict) else value
