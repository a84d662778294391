"""The second lane: blocks s+1 .. L-1 once more, or as far as they are wanted, with the main lane's weights."""

from __future__ import annotations

from sasa_export.errors import RewriteError
from sasa_export.graph import LayerGraph, Node
from sasa_export.rewrite.settings import LaneSettings, require


def add_second_lane(graph: LayerGraph, settings: LaneSettings) -> LayerGraph:
    if settings.safety_layer is None:
        return graph
    before = require(graph, "sasa.projection", "the second lane").name
    blocks = graph.of("block")
    for node in graph.of("between"):
        # What is added between two blocks is no block's doing, so replaying blocks would lose it.
        if graph[node.inputs[0]].attributes.get("index", -1) >= settings.safety_layer:
            raise RewriteError(
                f"{node.name}: the model adds to the hidden state between blocks behind the safety layer, and "
                "the second lane would miss it. Choose a later --safety-layer."
            )
    last = settings.last(graph)
    if not settings.safety_layer <= last < len(blocks):
        raise RewriteError(
            f"--probe-block is {last}; it must be from the safety layer, {settings.safety_layer}, to the last block, "
            f"{len(blocks) - 1}."
        )
    lane = []
    for block in blocks[settings.safety_layer + 1 : last + 1]:
        index = block.attributes["index"]
        lane.append(Node(f"sasa.lane.layers.{index}", "lane_block", (before,), block.module, {"index": index}))
        before = lane[-1].name
    return graph.add(*lane)
