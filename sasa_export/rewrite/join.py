"""The ends of several lanes side by side: one linear probe on them weighs the verdict of each."""

from __future__ import annotations

from sasa_export.graph import LayerGraph, Node
from sasa_export.rewrite.settings import LaneSettings, lane_ends


def add_join(graph: LayerGraph, settings: LaneSettings) -> LayerGraph:
    if not settings.further_pairs:
        return graph
    return graph.add(Node("sasa.join", "join", tuple(end.name for end in lane_ends(graph))))
