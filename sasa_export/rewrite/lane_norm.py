"""The final norm of the lane, at the last prompt position alone."""

from __future__ import annotations

from sasa_export.graph import LayerGraph, Node
from sasa_export.rewrite.settings import LaneSettings, require


def add_lane_norm(graph: LayerGraph, settings: LaneSettings) -> LayerGraph:
    last = len(graph.of("block")) - 1
    before = require(graph, f"sasa.lane.layers.{last}", "the lane's norm")
    norm = require(graph, "norm", "the lane's norm")
    return graph.add(Node("sasa.lane.norm", "lane_norm", (before.name,), norm.module))
