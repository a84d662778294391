"""Tap the safety layer and the semantic layer: keep their output for every token.

Without projection, the last block is tapped: the probe reads its output.
"""

from __future__ import annotations

from sasa_export.errors import RewriteError
from sasa_export.graph import LayerGraph, Node
from sasa_export.rewrite.settings import LaneSettings, require, scope


def add_taps(graph: LayerGraph, settings: LaneSettings) -> LayerGraph:
    blocks = len(graph.of("block"))
    if not settings.pairs:
        last = require(graph, f"layers.{blocks - 1}", "the tap")
        if require(graph, "norm", "the tap").inputs != (last.name,):
            raise RewriteError(
                f"{last.name}: the final norm reads something else than the last block's output, so a probe without "
                "projection would miss it. Export with the projection."
            )
        return graph.add(Node("sasa.last", "tap", (last.name,), last.module, {"of": "last", "index": blocks - 1}))
    if len(set(settings.pairs)) < len(settings.pairs):
        raise RewriteError("--further-pair names a pair of layers that is there already. Give each of them once.")
    taps = []
    for number, (safety, semantic) in enumerate(settings.pairs):
        if not 0 <= safety < semantic < blocks:
            raise RewriteError(
                f"safety layer {safety} and semantic layer {semantic} do not fit a decoder of {blocks} blocks: "
                f"0 <= safety layer < semantic layer <= {blocks - 1} must hold. "
                "Set --safety-layer and --semantic-layer (zero-based)"
                f"{' and --further-pair' if settings.further_pairs else ''}."
            )
        for of, index in (("safety", safety), ("semantic", semantic)):
            block = require(graph, f"layers.{index}", "the tap")
            attributes = {"of": of, "index": index}
            taps.append(Node(f"{scope(number)}.{of}", "tap", (block.name,), block.module, attributes))
    return graph.add(*taps)
