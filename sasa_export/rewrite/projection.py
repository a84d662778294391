"""Project the safety state onto the semantic state (the paper's Eq. 8); the result replaces h_s."""

from __future__ import annotations

from sasa_export.graph import LayerGraph, Node
from sasa_export.rewrite.settings import LaneSettings, require, scope


def add_projection(graph: LayerGraph, settings: LaneSettings) -> LayerGraph:
    for number in range(len(settings.pairs)):
        names = (f"{scope(number)}.{of}" for of in ("safety", "semantic"))
        inputs = tuple(require(graph, name, "the projection").name for name in names)
        attributes = {"epsilon": settings.epsilon}
        graph = graph.add(Node(f"{scope(number)}.projection", "projection", inputs, None, attributes))
    return graph
