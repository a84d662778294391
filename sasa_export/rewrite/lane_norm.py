"""The final norm of the lane, at the last prompt positions alone; without a lane, of the main lane's end."""

from __future__ import annotations

from sasa_export.graph import LayerGraph, Node
from sasa_export.rewrite.settings import LaneSettings, require


def add_lane_norm(graph: LayerGraph, settings: LaneSettings) -> LayerGraph:
    last = settings.last(graph)
    if settings.safety_layer is None:
        name = "sasa.last"
    else:
        name = "sasa.projection" if last == settings.safety_layer else f"sasa.lane.layers.{last}"
    before = require(graph, name, "the lane's norm")
    norm = require(graph, "norm", "the lane's norm")
    mean = {} if settings.probe_positions == 1 else {"positions": settings.probe_positions}
    return graph.add(Node("sasa.lane.norm", "lane_norm", (before.name,), norm.module, mean))
