"""Executing the graph: projection, second lane and probe."""

import inspect
from typing import Any

import torch
from torch import nn

from sasa_export.runtime.formulas import project
from sasa_export.runtime.ledger import PICTURE, Ledger
from sasa_export.runtime.nodes import graph_ends, lane_entries, positions_read
from sasa_export.runtime.watch import Recording, recording
from sasa_export.runtime.words import last_places

CACHES = ("past_key_values", "past_key_value", "layer_past")


def replay(module: nn.Module, state: torch.Tensor, seen: tuple[tuple, dict], cache: Any = None) -> torch.Tensor:
    """Run a block on another state with the arguments of the main lane, on another cache than the main lane's."""
    args, kwargs = seen
    kwargs = dict(kwargs)
    for name in CACHES:
        if name in kwargs:
            kwargs[name] = cache
    if "use_cache" in kwargs:
        kwargs["use_cache"] = cache is not None
    mask = kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 4:
        if cache is None:  # a static cache's mask spans its whole length
            kwargs["attention_mask"] = mask[..., : state.shape[1]]
    elif mask is not None and not isinstance(mask, torch.Tensor):
        raise NotImplementedError(
            f"the second lane cannot replay an attention mask of type {type(mask).__name__}. "
            "Load the model with attn_implementation='sdpa' or 'eager'."
        )
    if args:
        output = module(state, *args[1:], **kwargs)
    else:
        kwargs["hidden_states"] = state
        output = module(**kwargs)
    return output[0] if isinstance(output, tuple) else output  # (batch, tokens, hidden)


def project_taps(graph: list[dict[str, Any]], seen: Recording) -> torch.Tensor:
    """The projection of the tokens that the main lane just ran on: (batch, tokens, hidden).

    Several pairs of layers have theirs side by side: (batch, tokens, pairs * hidden). Without projection it is the
    output of the last block, which the probe then reads.
    """
    outputs = {node["name"]: seen.outputs[node["module"]] for node in graph if node["op"] == "tap"}
    found = []
    for node in lane_entries(graph):
        if node["op"] == "tap":
            return outputs[node["name"]]
        safety, semantic = (outputs[name] for name in node["inputs"])
        found.append(project(safety.to(semantic.device), semantic, node["epsilon"]))
    return found[0] if len(found) == 1 else torch.cat([one.to(found[0].device) for one in found], dim=-1)


def run_lane(
    model: nn.Module,
    graph: list[dict[str, Any]],
    projection: torch.Tensor,
    arguments: dict[str, tuple[tuple, dict]],
    judged: torch.Tensor,
    real: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Execute the nodes of the second lane, or of several, and the probe.

    Args:
        graph: `config.sasa["graph"]`; nodes of other operations are passed over.
        projection: (batch, tokens, hidden), of the whole context; of several pairs side by side.
        arguments: what the decoder hands to each block over the whole context.
        judged: (batch,), the position whose state the probe reads, or the last of those whose mean it reads.
        real: (batch, tokens), bool, False at padding.

    Returns the value of each node by its name.
    """
    names = [node["name"] for node in lane_entries(graph)]
    parts = projection.chunk(len(names), dim=-1) if len(names) > 1 else (projection,)  # (batch, tokens, hidden) each
    values = dict(zip(names, parts, strict=True))
    for node in graph:
        if node["op"] == "lane_block":
            path = node["module"]
            values[node["name"]] = replay(model.get_submodule(path), values[node["inputs"][0]], arguments[path])
    return run_probe_at(model, graph, values, judged, real) | values


def run_probe_at(
    model: nn.Module,
    graph: list[dict[str, Any]],
    values: dict[str, torch.Tensor],
    judged: torch.Tensor,
    real: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Execute what follows the last block of each second lane, for verdicts at some positions.

    Args:
        values: those of the lanes' blocks over the whole context, (batch, context, hidden), by name.
        judged: (batch,) or (batch, verdicts); real: (batch, context), bool.

    Returns the value of each node by its name; that of the probe has the shape of `judged`.
    """
    count, places = positions_read(graph), None
    if count > 1:
        places = last_places(real, judged if judged.dim() > 1 else judged[:, None], count)  # (batch, verdicts, count)
    read = {}
    for name in graph_ends(graph):
        state = values[name]  # (batch, context, hidden)
        rows = torch.arange(state.shape[0], device=state.device)  # (batch,)
        rows = rows if judged.dim() == 1 and places is None else rows[:, None]
        at = judged if places is None else places.clamp_min(0).flatten(1)
        read[name] = state[rows, at.to(state.device)]  # (*judged, hidden), or (batch, verdicts * count, hidden)
    return run_probe(model, graph, read, places if places is None or judged.dim() > 1 else places[:, 0])


def _mean(state: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The mean of states (..., positions, hidden) over the places (..., positions) that are none of -1."""
    found = (places >= 0).unsqueeze(-1).to(state.device)  # (..., positions, 1)
    total = (state.float() * found).sum(-2) / found.sum(-2).clamp_min(1)  # (..., hidden)
    return total.to(state.dtype)


def run_probe(
    model: nn.Module, graph: list[dict[str, Any]], ends: dict[str, torch.Tensor], places: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Execute what follows the last block of each second lane, on its output (..., hidden) at the judged positions.

    With `places` (..., positions), as `last_places` gives them, the states are (batch, all of these positions, hidden),
    and the probe reads a mean.

    Args: ends: the outputs, by the names that `graph_ends` gives.

    Returns the value of each node by its name; that of the probe is P(unsafe), (...).
    """
    values = dict(ends)
    for node in graph:
        operation, inputs = node["op"], node["inputs"]
        if operation == "lane_norm":
            state = values[inputs[0]]
            shaped = state if state.dim() == 3 else state.unsqueeze(1)  # (batch, positions, hidden)
            value = model.get_submodule(node["module"])(shaped).reshape(state.shape)  # (..., hidden)
            if places is not None:
                value = _mean(value.reshape(*places.shape, state.shape[-1]), places)  # (..., hidden)
        elif operation == "lane_head":
            value = model.get_submodule(node["module"])(values[inputs[0]])  # (..., vocabulary)
            if node.get("softcap"):
                value = torch.tanh(value.float() / node["softcap"]) * node["softcap"]
        elif operation == "join":
            first = values[inputs[0]]
            value = torch.cat([values[name].to(first.device) for name in inputs], dim=-1)  # (..., lanes * features)
        elif operation == "probe":
            value = model.get_submodule(node["module"])(values[inputs[0]])  # (...)
        else:
            continue
        values[node["name"]] = value
    return values


def run_graph(
    model: nn.Module, graph: list[dict[str, Any]], seen: Recording, judged: torch.Tensor, real: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Projection, second lane and probe over one whole prompt, right after the main lane ran on it.

    Args:
        seen: the main lane's recording; judged (batch,) and real (batch, tokens): as in `run_lane`.
    """
    return run_lane(model, graph, project_taps(graph, seen), seen.arguments, judged, real)


def context_arguments(
    decoder: Any, projection: torch.Tensor, real: torch.Tensor, columns: torch.Tensor, ledger: Ledger
) -> dict[str, tuple[tuple, dict]]:
    """What the decoder hands to its blocks over a whole context, of which it was fed only the end.

    Args:
        decoder: the model under the head, a picture's place in its masks included.
        projection: (batch, context, hidden), of any lane: (batch, context, lanes * hidden); real: (batch, context);
        columns: (batch, context, columns).
    """
    arguments = {
        "inputs_embeds": projection[..., : ledger.hidden // ledger.lanes],
        "attention_mask": real.long(),
        "position_ids": ledger.positions(columns),
        "use_cache": False,
    }
    if "token_type_ids" in inspect.signature(decoder.forward).parameters:
        arguments["token_type_ids"] = columns[..., PICTURE]
    with recording(dry=True) as seen:
        decoder(**arguments)
    return seen.arguments
