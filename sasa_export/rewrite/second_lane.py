"""The second lane: blocks s+1 .. L-1 once more, or as far as they are wanted, with the main lane's weights.

Each pair of layers has one.
"""

from __future__ import annotations

from sasa_export.errors import RewriteError
from sasa_export.graph import LayerGraph, Node
from sasa_export.rewrite.settings import LaneSettings, require, scope


def add_second_lane(graph: LayerGraph, settings: LaneSettings) -> LayerGraph:
    for number, (safety, _) in enumerate(settings.pairs):
        graph = _add_lane(graph, settings, scope(number), safety)
    return graph


def _add_lane(graph: LayerGraph, settings: LaneSettings, scope: str, safety: int) -> LayerGraph:
    before = require(graph, f"{scope}.projection", "the second lane").name
    blocks = graph.of("block")
    for node in graph.of("between"):
        # What is added between two blocks is no block's doing, so replaying blocks would lose it.
        if graph[node.inputs[0]].attributes.get("index", -1) >= safety:
            raise RewriteError(
                f"{node.name}: the model adds to the hidden state between blocks behind the safety layer, and "
                "the second lane would miss it. Choose a later --safety-layer."
            )
    last = settings.last(graph)
    if not safety <= last < len(blocks):
        raise RewriteError(
            f"--probe-block is {last}; it must be from the safety layer, {safety}, to the last block, "
            f"{len(blocks) - 1}."
        )
    lane = []
    for block in blocks[safety + 1 : last + 1]:
        index = block.attributes["index"]
        lane.append(Node(f"{scope}.lane.layers.{index}", "lane_block", (before,), block.module, {"index": index}))
        before = lane[-1].name
    return graph.add(*lane)
