"""Executes the graph of config.sasa: records the main lane, then runs the second lane on the recorded states."""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sasa_export.runtime.formulas import project
from sasa_export.runtime.host import OF_DECODER, alone, check_names
from sasa_export.runtime.verdict import last_tokens
from sasa_export.runtime.version import TRIED

Graph = list[dict[str, Any]]
Arguments = dict[str, tuple[tuple, dict]]  # module path -> args, kwargs
Values = dict[str, Tensor]  # node name -> value
# Arguments by which families tell a picture's tokens from text. The first one present counts.
TYPES = ("moe_mm_token_type_ids", "token_type_ids", "mm_token_type_ids")


@dataclass
class Recording:
    """Inputs and outputs of the main lane's blocks during one forward pass."""

    dry: bool = False  # blocks return their input: only the arguments that they get are wanted
    outputs: dict[str, Tensor] = field(default_factory=dict)  # module path -> (batch, tokens, hidden)
    arguments: Arguments = field(default_factory=dict)  # of the decoder and its blocks
    position_ids: Tensor | None = None  # as the decoder got them, or made them for its blocks


current_recording: contextvars.ContextVar[Recording | None] = contextvars.ContextVar("recording", default=None)


@functools.cache
def _watched(cls: type) -> type:
    """Return a subclass that records its calls in the current Recording. It keeps the name, which device maps use.

    Instances are moved to it by `__class__`, as torch's own fully_shard and parametrize do. Other ways fail: a module
    around the block changes the names of its weights, a forward set on the instance goes on running the original's
    blocks in a deepcopy and is lost to accelerate, and a hook cannot skip the block, which the dry run must.
    """

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        recording, (path, role, names) = current_recording.get(), self._sasa_watched
        if recording is None:  # the second lane runs the same blocks unrecorded
            return cls.__call__(self, *args, **kwargs)
        recording.arguments[path] = (args, kwargs)
        if recording.position_ids is None:
            recording.position_ids = {**dict(zip(names, args, strict=False)), **kwargs}.get("position_ids")
        if role == "decoder":
            return cls.__call__(self, *args, **kwargs)
        if recording.dry:
            return args[0] if args else kwargs["hidden_states"]
        output = cls.__call__(self, *args, **kwargs)
        if role == "tapped":
            recording.outputs[path] = output[0] if isinstance(output, tuple) else output
        return output

    def reduce(self: Any, protocol: Any) -> Any:  # pickle finds classes by name, and would find `cls`
        return _new_watched, (cls,), self.__dict__

    said = {"__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), {"__call__": call, "__reduce_ex__": reduce, **said})


def _new_watched(cls: type) -> Any:
    return object.__new__(_watched(cls))


def watch(model: nn.Module, graph: list[dict[str, Any]]) -> list[nn.Module]:
    """Make the decoder and its blocks record their calls, and return these modules."""
    tapped = {node["module"] for node in graph if node["op"] == "tap"}
    blocks = [node["module"] for node in graph if node["op"] == "block"]
    roles = {path: "tapped" if path in tapped else "block" for path in blocks}
    roles[blocks[0].rsplit(".", 2)[0]] = "decoder"
    watched = []
    for path, role in roles.items():
        module = model.get_submodule(path)
        names = check_names(type(module).forward, OF_DECODER if role == "decoder" else ())[1:]
        module._sasa_watched = (path, role, names)  # type: ignore[assignment]
        module.__class__ = _watched(type(module))  # type: ignore[arg-type]
        watched.append(module)
    return watched


@contextlib.contextmanager
def within(variable: contextvars.ContextVar, value: Any) -> Iterator[Any]:
    """Set a context variable to this value within a `with` block."""
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)


def start(graph: Graph, seen: Recording) -> tuple[str, Tensor, Values]:
    """Return the node where the second lane starts, its value (batch, tokens, hidden), and the tapped blocks' outputs.
    The value is the projection of the call's tokens or, in a graph without one, the last block's output."""
    try:
        outputs = {node["name"]: seen.outputs[node["module"]] for node in graph if node["op"] == "tap"}
    except KeyError as error:
        what = f"the gate did not see {error} run, so that it cannot judge: something runs in its place"
        raise ValueError(f"{what}. Load with use_kernels=False, or install transformers=={TRIED[-1]}") from None
    for node in graph:
        if node["op"] == "projection":
            safety, semantic = (outputs[name] for name in node["inputs"])
            return node["name"], project(safety.to(semantic.device), semantic, node["epsilon"]), outputs
    return *next(iter(outputs.items())), outputs


def at_judged(outputs: Values, at: Tensor) -> Values:
    """Return the tapped blocks' outputs (batch, tokens, hidden) at one token per row, (batch,): (batch, 1, hidden)."""
    return {
        name: value.gather(1, at.to(value.device)[:, None, None].expand(-1, 1, value.shape[-1]))
        for name, value in outputs.items()
    }


def reached(graph: Graph, at: Tensor, real: Tensor, states: Tensor, positions: Tensor, types: Tensor) -> list[Tensor]:
    """Return `at`, mask, states, positions and types of the lane's tokens: each row's last real tokens up to `at`
    (batch,), as many as the graph sets. Shorter rows get padding behind, which causal blocks do not see."""
    count = next((node["tokens"] for node in graph if node["op"] == "projection"), 1)  # without a lane, the judged one
    index, at, there = last_tokens(real, at.to(real.device), count)  # (batch, reached), (batch,), (batch, reached)
    rows = index.to(states.device)[..., None].expand(-1, -1, states.shape[-1])  # (batch, reached, hidden)
    places = index.to(positions.device).expand(*positions.shape[:-1], count)  # like positions
    types = types.gather(1, index.to(types.device))  # (batch, reached)
    return [at, there, states.gather(1, rows), positions.gather(-1, places), types]


def context_arguments(model: Any, graph: Graph, states: Tensor, mask: Tensor, positions: Any, types: Any) -> Arguments:
    """Return what a model gives its blocks over a context of states (batch, context, hidden): masks, rotary tables, and
    any arguments of its family. `mask`, and `types` of tokens if the family has them, are (batch, context)."""
    path = next(node["module"] for node in graph if node["op"] == "block")
    decoder = model.get_submodule(path.partition(".")[0])  # the outermost module around the blocks
    decoder = getattr(decoder, "_orig_mod", decoder)  # torch.compile wraps it
    arguments = {"inputs_embeds": states, "attention_mask": mask, "position_ids": positions, "use_cache": False}
    taken = check_names(decoder.forward, OF_DECODER)
    if types is not None:
        arguments |= {name: types for name in TYPES if name in taken}
    if "logits_to_keep" in taken:  # if it contains the head
        arguments["logits_to_keep"] = 1
    with within(current_recording, Recording(dry=True)) as seen:
        decoder(**arguments)
    return seen.arguments


def run_lane(model: nn.Module, graph: Graph, values: Values, arguments: Arguments, at: Tensor) -> Values:
    """Run the second lane's nodes, and return all values by node. `values` come from `start` and `at_judged`. Blocks
    run over the context with their `arguments`: (batch, context, hidden). Norm, head and probe read one position per
    row, `at` (batch,): (batch, features) behind norm and head, and P(unsafe) (batch,)."""
    values = dict(values)
    for node in graph:
        operation, before = node["op"], values.get(node["inputs"][0]) if node["inputs"] else None
        if before is None or operation not in ("lane_block", "lane_norm", "state_norm", "join", "lane_head", "probe"):
            continue
        if operation == "join":
            parts = [values[name] for name in node["inputs"]]
            values[node["name"]] = torch.cat([part.to(before.device, before.dtype) for part in parts], dim=-1)
            continue
        module = model.get_submodule(node["module"])
        if operation == "state_norm":
            value = module(before)[:, 0]  # (batch, hidden)
        elif operation == "lane_block":
            value = replay(module, before, arguments[node["module"]])  # (batch, context, hidden)
        elif operation == "lane_norm":
            rows = torch.arange(before.shape[0], device=before.device)  # (batch,)
            value = module(before[rows, at.to(before.device)][:, None])[:, 0]  # (batch, hidden)
        else:
            value = module(before)  # (batch, vocabulary) of the head, (batch,) of the probe
        if node.get("softcap"):
            value = torch.tanh(value.float() / node["softcap"]) * node["softcap"]
        values[node["name"]] = value
    return values


def replay(module: nn.Module, state: Tensor, seen: tuple[tuple, dict]) -> Tensor:
    """Run a block on another state (batch, context, hidden), without a cache."""
    args, kwargs = alone(*seen)
    output = module(state, *args[1:], **kwargs) if args else module(**{**kwargs, "hidden_states": state})
    return output[0] if isinstance(output, tuple) else output  # (batch, context, hidden)
