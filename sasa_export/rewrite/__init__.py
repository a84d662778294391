"""The rewrite: small passes, each of which adds one step of SASA to a traced graph.

A pass is a function `(graph, settings) -> graph`. It checks its preconditions first and raises RewriteError,
which names the node, where one does not hold.
"""

from __future__ import annotations

from sasa_export.graph import LayerGraph
from sasa_export.rewrite.gate import add_gate
from sasa_export.rewrite.join import add_join
from sasa_export.rewrite.lane_head import add_lane_head
from sasa_export.rewrite.lane_norm import add_lane_norm
from sasa_export.rewrite.probe import add_probe
from sasa_export.rewrite.projection import add_projection
from sasa_export.rewrite.second_lane import add_second_lane
from sasa_export.rewrite.settings import LaneSettings
from sasa_export.rewrite.tap import add_taps

LANE_PASSES = (add_taps, add_projection, add_second_lane, add_lane_norm, add_lane_head, add_join)
GATE_PASSES = (add_probe, add_gate)

__all__ = ["GATE_PASSES", "LANE_PASSES", "LaneSettings", "rewrite", "rewrite_lane"]


def rewrite_lane(graph: LayerGraph, settings: LaneSettings) -> LayerGraph:
    """The second lane alone: what calibration reads its features from."""
    for apply in LANE_PASSES:
        graph = apply(graph, settings)
    return graph


def rewrite(graph: LayerGraph, settings: LaneSettings) -> LayerGraph:
    """The whole rewrite: second lane, probe and gate."""
    graph = rewrite_lane(graph, settings)
    for apply in GATE_PASSES:
        graph = apply(graph, settings)
    return graph
