"""The final norm of the lane, at the last prompt positions alone; without a lane, of the main lane's end."""

from __future__ import annotations

from sasa_export.graph import LayerGraph, Node
from sasa_export.rewrite.settings import LaneSettings, require, scope


def add_lane_norm(graph: LayerGraph, settings: LaneSettings) -> LayerGraph:
    last = settings.last(graph)
    ends = [
        f"{scope(number)}.projection" if last == safety else f"{scope(number)}.lane.layers.{last}"
        for number, (safety, _) in enumerate(settings.pairs)
    ]
    for number, name in enumerate(ends or ["sasa.last"]):
        before = require(graph, name, "the lane's norm")
        norm = require(graph, "norm", "the lane's norm")
        mean = {} if settings.probe_positions == 1 else {"positions": settings.probe_positions}
        graph = graph.add(Node(f"{scope(number)}.lane.norm", "lane_norm", (before.name,), norm.module, mean))
    return graph
