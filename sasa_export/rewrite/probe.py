"""The linear probe on the lane: P(unsafe) of the prompt."""

from __future__ import annotations

from sasa_export.graph import LayerGraph, Node
from sasa_export.rewrite.settings import LaneSettings, lane_ends, require


def add_probe(graph: LayerGraph, settings: LaneSettings) -> LayerGraph:
    ends = graph.of("join") or lane_ends(graph)
    before = ends[0].name if ends else require(graph, "sasa.lane.norm", "the probe").name
    return graph.add(Node("sasa.probe", "probe", (before,), "sasa.probe"))
