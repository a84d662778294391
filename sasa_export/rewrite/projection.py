"""Project the safety state onto the semantic state (the paper's Eq. 8); the result replaces h_s."""

from __future__ import annotations

from sasa_export.graph import LayerGraph, Node
from sasa_export.rewrite.settings import LaneSettings, require


def add_projection(graph: LayerGraph, settings: LaneSettings) -> LayerGraph:
    if settings.safety_layer is None:
        return graph
    inputs = tuple(require(graph, name, "the projection").name for name in ("sasa.safety", "sasa.semantic"))
    return graph.add(Node("sasa.projection", "projection", inputs, None, {"epsilon": settings.epsilon}))
