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
    reads the mean over the last `probe_positions` tokens of the prompt. Each of the `further_pairs` of safety and
    semantic layer has a projection and a second lane of its own, whose end the probe reads behind that of the first.
    """

    safety_layer: int | None
    semantic_layer: int | None
    epsilon: float = 1e-6
    softcap: float | None = None
    probe_block: int | None = None
    probe_positions: int = 1
    further_pairs: tuple[tuple[int, int], ...] = ()

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """All pairs of safety and semantic layer; none without projection."""
        if self.safety_layer is None or self.semantic_layer is None:
            return ()
        return (self.safety_layer, self.semantic_layer), *self.further_pairs

    def last(self, graph: LayerGraph) -> int:
        """The block whose output the probe reads."""
        return len(graph.of("block")) - 1 if self.probe_block is None else self.probe_block


def scope(number: int) -> str:
    """What the names of a pair's nodes begin with, counted from 0."""
    return "sasa" if number == 0 else f"sasa.pair{number + 1}"


def lane_ends(graph: LayerGraph) -> tuple[Node, ...]:
    """The nodes whose values the probe reads, one a lane."""
    return graph.of("lane_head") or graph.of("lane_norm")


def require(graph: LayerGraph, name: str, needed_by: str) -> Node:
    """The named node, or RewriteError that says which pass misses it."""
    try:
        return graph[name]
    except KeyError:
        raise RewriteError(f"{needed_by} needs the node {name}, which the graph does not have.") from None
