"""Executing the graph of config.sasa: projection, second lane and probe."""

import inspect
from typing import Any

import torch
from torch import nn

from sasa_export.runtime.formulas import project
from sasa_export.runtime.watch import Recording, recording

Graph = list[dict[str, Any]]
Arguments = dict[str, tuple[tuple, dict]]  # module path -> args, kwargs
CACHES = ("past_key_values", "past_key_value", "layer_past")


def project_taps(graph: Graph, seen: Recording) -> torch.Tensor:
    """What the second lane starts from: the projection of the tokens that the main lane just ran on.

    Without projection it is the output of the last block, which the probe then reads. (batch, tokens, hidden).
    """
    outputs = {node["name"]: seen.outputs[node["module"]] for node in graph if node["op"] == "tap"}
    for node in graph:
        if node["op"] == "projection":
            safety, semantic = (outputs[name] for name in node["inputs"])
            return project(safety.to(semantic.device), semantic, node["epsilon"])
    return next(iter(outputs.values()))


def entry_of(graph: Graph) -> str:
    """The node whose value `project_taps` gives."""
    entries = [node["name"] for node in graph if node["op"] == "projection"]
    return (entries or [node["name"] for node in graph if node["op"] == "tap"])[0]


def context_arguments(decoder: Any, states: torch.Tensor, mask: torch.Tensor, positions: Any, types: Any) -> Arguments:
    """What a decoder hands to its blocks over a whole context: masks, rotary tables, whatever its family has.

    Args:
        decoder: the model under the head; states: (batch, context, hidden); mask: (batch, context), int64.
        positions: as the decoder takes them; types: (batch, context), for families that tell pictures from text by it.
    """
    arguments = {"inputs_embeds": states, "attention_mask": mask, "position_ids": positions, "use_cache": False}
    if types is not None and "token_type_ids" in inspect.signature(decoder.forward).parameters:
        arguments["token_type_ids"] = types
    with recording(dry=True) as seen:
        decoder(**arguments)
    return seen.arguments


def run_lane(model: nn.Module, graph: Graph, states: torch.Tensor, arguments: Arguments) -> dict[str, torch.Tensor]:
    """Run the blocks of the second lane.

    Args: states: (batch, context, hidden), as `project_taps` gives them; arguments: of each block over the context.

    Returns the value of each node by its name, (batch, context, hidden).
    """
    values = {entry_of(graph): states}
    for node in graph:
        if node["op"] == "lane_block":
            module, (before,) = node["module"], node["inputs"]
            values[node["name"]] = _replay(model.get_submodule(module), values[before], arguments[module])
    return values


def _replay(module: nn.Module, state: torch.Tensor, seen: tuple[tuple, dict]) -> torch.Tensor:
    """Run a block on another state (batch, context, hidden), without a cache."""
    args, kwargs = seen
    kwargs = {name: None if name in CACHES else value for name, value in kwargs.items()}
    if "use_cache" in kwargs:
        kwargs["use_cache"] = False
    if args:
        output = module(state, *args[1:], **kwargs)
    else:
        output = module(**{**kwargs, "hidden_states": state})
    return output[0] if isinstance(output, tuple) else output  # (batch, context, hidden)


def read_lane(
    model: nn.Module, graph: Graph, values: dict[str, torch.Tensor], at: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Execute what follows the blocks: norm, head where it is not linear, and probe, at one position a row.

    Args: values: those of the blocks by name, (batch, context, hidden); at: (batch,).

    Returns the value of each of these nodes by its name; that of the probe is P(unsafe), (batch,).
    """
    found: dict[str, torch.Tensor] = {}
    for node in graph:
        operation = node["op"]
        if operation == "lane_norm":
            state = values[node["inputs"][0]]  # (batch, context, hidden)
            rows = torch.arange(state.shape[0], device=state.device)  # (batch,)
            read = state[rows, at.to(state.device)][:, None]  # (batch, 1, hidden)
            value = model.get_submodule(node["module"])(read)[:, 0]  # (batch, hidden)
        elif operation == "lane_head":
            value = model.get_submodule(node["module"])(found[node["inputs"][0]])  # (batch, vocabulary)
            if node.get("softcap"):
                value = torch.tanh(value.float() / node["softcap"]) * node["softcap"]
        elif operation == "probe":
            value = model.get_submodule(node["module"])(found[node["inputs"][0]])  # (batch,)
        else:
            continue
        found[node["name"]] = value
    return found
