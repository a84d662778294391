"""The rewrite: it adds the steps of SASA to a traced graph, each of which reads the one before.

    tap -> projection -> second lane -> norm -> head (where it is not linear) -> probe -> gate

RewriteError names the node where settings do not fit the model.
"""

from __future__ import annotations

from dataclasses import dataclass

from sasa_export.errors import RewriteError
from sasa_export.graph import LayerGraph, Node


@dataclass(frozen=True)
class LaneSettings:
    """Zero-based safety and semantic layer, the projection's epsilon, and the head's logit soft cap if any.

    Without layers there is no projection and no second lane: the probe reads the end of the main lane.
    """

    safety_layer: int | None
    semantic_layer: int | None
    epsilon: float = 1e-6
    softcap: float | None = None

    @property
    def pair(self) -> tuple[int, int] | None:
        """Safety and semantic layer; None without projection, and so without a second lane."""
        if self.safety_layer is None or self.semantic_layer is None:
            return None
        return self.safety_layer, self.semantic_layer


def rewrite(graph: LayerGraph, settings: LaneSettings) -> LayerGraph:
    """The whole rewrite: second lane, probe, and the gate on the logits: the model's own, or the refusal's."""
    graph = rewrite_lane(graph, settings)
    logits = "after_head" if graph.of("after_head") else "head"
    probe = Node("sasa.probe", "probe", (graph.nodes[-1].name,), "sasa.probe")
    return graph.add(probe, Node("sasa.gate", "gate", (logits, "sasa.probe")))


def rewrite_lane(graph: LayerGraph, settings: LaneSettings) -> LayerGraph:
    """The second lane alone, with norm and head at the judged position: what calibration reads its features from."""
    if settings.pair is None:
        graph = add_end_of_main_lane(graph)
    else:
        graph = add_second_lane(add_projection(graph, settings, *settings.pair), settings, settings.pair[0])
    graph = graph.add(Node("sasa.lane.norm", "lane_norm", (graph.nodes[-1].name,), graph["norm"].module))
    return add_lane_head(graph, settings) if graph.of("after_head") else graph


def add_end_of_main_lane(graph: LayerGraph) -> LayerGraph:
    """Keep the output of the last block, which a probe without projection reads."""
    last = graph.of("block")[-1]
    if graph["norm"].inputs != (last.name,):
        raise RewriteError(
            f"{last.name}: the final norm reads something else than the last block's output, so a probe without "
            "projection would miss it. Export with the projection."
        )
    attributes = {"of": "last", "index": last.attributes["index"]}
    return graph.add(Node("sasa.last", "tap", (last.name,), last.module, attributes))


def add_projection(graph: LayerGraph, settings: LaneSettings, safety: int, semantic: int) -> LayerGraph:
    """Keep the output of both layers for every token, and project the safety state onto the semantic state (the paper's
    Eq. 8); the result replaces h_s."""
    blocks = len(graph.of("block"))
    if not 0 <= safety < semantic < blocks:
        raise RewriteError(
            f"safety layer {safety} and semantic layer {semantic} do not fit a decoder of {blocks} blocks: "
            f"0 <= safety layer < semantic layer <= {blocks - 1} must hold. "
            "Set --safety-layer and --semantic-layer (zero-based)."
        )
    for of, index in (("safety", safety), ("semantic", semantic)):
        block = graph[f"layers.{index}"]
        graph = graph.add(Node(f"sasa.{of}", "tap", (block.name,), block.module, {"of": of, "index": index}))
    inputs = ("sasa.safety", "sasa.semantic")
    return graph.add(Node("sasa.projection", "projection", inputs, None, {"epsilon": settings.epsilon}))


def add_second_lane(graph: LayerGraph, settings: LaneSettings, safety: int) -> LayerGraph:
    """Blocks s+1 .. L-1 once more, with the main lane's weights."""
    blocks, earliest = graph.of("block"), graph.earliest_safety_layer()
    if safety < earliest:
        # What is added between two blocks is no block's doing, so replaying blocks would lose it.
        possible = f"{earliest} is the first" if earliest < len(blocks) - 1 else "here there is none"
        raise RewriteError(
            f"{graph.of('between')[-1].name}: the model adds to the hidden state between blocks behind the safety "
            f"layer, {safety}, and the second lane would miss it. Choose a later --safety-layer: {possible} that can "
            "be."
        )
    for block in blocks[safety + 1 :]:
        name, before = f"sasa.lane.{block.name}", graph.nodes[-1].name
        graph = graph.add(Node(name, "lane_block", (before,), block.module, {"index": block.attributes["index"]}))
    return graph


def add_lane_head(graph: LayerGraph, settings: LaneSettings) -> LayerGraph:
    """The head of the lane, where something follows the head of the main lane and the probe cannot fold through both.

    z = W_head h, so w . z = (W_head^T w) . h: the probe folds exactly into the hidden dimension, and the lane needs no
    head. Where something non-linear follows the head, folding is not exact: the probe then reads logits.
    """
    if settings.softcap is None:
        raise RewriteError(
            "after_head: the model changes its logits behind the head in a way that its configuration does not "
            "name (final_logit_softcapping), so the probe cannot read them. This model is not supported yet."
        )
    attributes = {"softcap": settings.softcap}
    return graph.add(Node("sasa.lane.head", "lane_head", ("sasa.lane.norm",), graph["head"].module, attributes))
