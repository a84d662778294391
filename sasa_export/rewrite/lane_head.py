"""The head of the lane, where the probe cannot fold through it.

z = W_head h, so w . z = (W_head^T w) . h: the probe folds exactly into the hidden dimension, and the lane
needs no head. Where something non-linear follows the head, folding is not exact: the probe then reads logits.
"""

from __future__ import annotations

from sasa_export.errors import RewriteError
from sasa_export.graph import LayerGraph, Node
from sasa_export.rewrite.settings import LaneSettings, require, scope


def add_lane_head(graph: LayerGraph, settings: LaneSettings) -> LayerGraph:
    if not graph.of("after_head"):
        return graph
    if settings.softcap is None:
        raise RewriteError(
            "after_head: the model changes its logits behind the head in a way that its configuration does not "
            "name (final_logit_softcapping), so the probe cannot read them. This model is not supported yet."
        )
    for number in range(max(1, len(settings.pairs))):
        before = require(graph, f"{scope(number)}.lane.norm", "the lane's head").name
        head = require(graph, "head", "the lane's head")
        attributes = {"softcap": settings.softcap}
        graph = graph.add(Node(f"{scope(number)}.lane.head", "lane_head", (before,), head.module, attributes))
    return graph
