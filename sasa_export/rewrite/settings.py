"""What the passes need to know."""

from __future__ import annotations

from dataclasses import dataclass

from sasa_export.errors import RewriteError
from sasa_export.graph import LayerGraph, Node


@dataclass(frozen=True)
class LaneSettings:
    """Zero-based safety and semantic layer, the projection's epsilon, and the head's logit soft cap if any.

    Without layers there is no projection and no second lane: the probe reads what the main lane ends in. With
    `probe_block` the second lane ends there; the safety layer's own number stands for the projection itself. The probe
    reads the mean over the last `probe_positions` tokens of the prompt.
    """

    safety_layer: int | None
    semantic_layer: int | None
    epsilon: float = 1e-6
    softcap: float | None = None
    probe_block: int | None = None
    probe_positions: int = 1

    def last(self, graph: LayerGraph) -> int:
        """The block whose output the probe reads."""
        return len(graph.of("block")) - 1 if self.probe_block is None else self.probe_block


def require(graph: LayerGraph, name: str, needed_by: str) -> Node:
    """The named node, or RewriteError that says which pass misses it."""
    try:
        return graph[name]
    except KeyError:
        raise RewriteError(f"{needed_by} needs the node {name}, which the graph does not have.") from None
