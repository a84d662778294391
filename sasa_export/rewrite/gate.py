"""The gate on the logits: the model's own, or the next token of the refusal."""

from __future__ import annotations

from sasa_export.graph import LayerGraph, Node
from sasa_export.rewrite.settings import LaneSettings, require


def add_gate(graph: LayerGraph, settings: LaneSettings) -> LayerGraph:
    logits = "after_head" if graph.of("after_head") else "head"
    inputs = tuple(require(graph, name, "the gate").name for name in (logits, "sasa.probe"))
    return graph.add(Node("sasa.gate", "gate", inputs))
