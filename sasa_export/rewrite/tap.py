"""Tap the safety layer and the semantic layer: keep their output for every token."""

from __future__ import annotations

from sasa_export.errors import RewriteError
from sasa_export.graph import LayerGraph, Node
from sasa_export.rewrite.settings import LaneSettings, require


def add_taps(graph: LayerGraph, settings: LaneSettings) -> LayerGraph:
    safety, semantic, blocks = settings.safety_layer, settings.semantic_layer, len(graph.of("block"))
    if not 0 <= safety < semantic < blocks:
        raise RewriteError(
            f"safety layer {safety} and semantic layer {semantic} do not fit a decoder of {blocks} blocks: "
            f"0 <= safety layer < semantic layer <= {blocks - 1} must hold. "
            "Set --safety-layer and --semantic-layer (zero-based)."
        )
    taps = []
    for of, index in (("safety", safety), ("semantic", semantic)):
        block = require(graph, f"layers.{index}", "the tap")
        taps.append(Node(f"sasa.{of}", "tap", (block.name,), block.module, {"of": of, "index": index}))
    return graph.add(*taps)
