"""Watching the main lane: what its blocks are called with and put out."""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass
class Recording:
    """What the main lane showed of its blocks during one forward pass."""

    dry: bool = False  # blocks pass their input through: only what the decoder hands to them is wanted
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)  # module path -> (batch, tokens, hidden)
    arguments: dict[str, tuple[tuple, dict]] = field(default_factory=dict)  # module path -> args, kwargs
    position_ids: torch.Tensor | None = None  # as the decoder got them


current_recording: contextvars.ContextVar[Recording | None] = contextvars.ContextVar("recording", default=None)


@functools.cache
def _watched(cls: type) -> type:
    """A module class whose instances show to the current Recording what they are called with and put out.

    It keeps the class's name, by which device maps and parallel plans know it.
    """

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        recording = current_recording.get()
        if recording is None:  # the second lane runs the same blocks: nothing to see then
            return cls.__call__(self, *args, **kwargs)
        path, role = self._sasa_watched
        if role == "decoder":
            recording.position_ids = kwargs.get("position_ids")
            return cls.__call__(self, *args, **kwargs)
        recording.arguments[path] = (args, kwargs)
        if recording.dry:
            return args[0] if args else kwargs["hidden_states"]
        output = cls.__call__(self, *args, **kwargs)
        if role == "tapped":
            recording.outputs[path] = output[0] if isinstance(output, tuple) else output
        return output

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__, "__doc__": cls.__doc__})


@dataclass
class Watch:
    """Undoes the watching of one module."""

    module: nn.Module

    def remove(self) -> None:
        self.module.__class__ = type(self.module).__mro__[1]
        del self.module._sasa_watched


def watch(model: nn.Module, graph: list[dict[str, Any]]) -> list[Watch]:
    """Watch the decoder and its blocks. Returns what removes the watching again."""
    tapped = {node["module"] for node in graph if node["op"] == "tap"}
    blocks = [node["module"] for node in graph if node["op"] == "block"]
    roles = {path: "tapped" if path in tapped else "block" for path in blocks}
    roles[blocks[0].rsplit(".", 2)[0]] = "decoder"
    watches = []
    for path, role in roles.items():
        module = model.get_submodule(path)
        module._sasa_watched = (path, role)  # type: ignore[assignment]
        module.__class__ = _watched(type(module))  # type: ignore[arg-type]
        watches.append(Watch(module))
    return watches


@contextlib.contextmanager
def recording(*, dry: bool = False) -> Iterator[Recording]:
    """Within this context, watched modules leave their outputs and arguments in the Recording."""
    seen = Recording(dry)
    token = current_recording.set(seen)
    try:
        yield seen
    finally:
        current_recording.reset(token)
