"""The rewrite: small passes, each of which adds one step of SASA to a traced graph.

    tap -> projection -> second lane -> norm -> head (where it is not linear) -> probe -> gate

A pass is a function `(graph, settings) -> graph`. It raises RewriteError, which names the node, where settings do not
fit the model.
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


def rewrite_lane(graph: LayerGraph, settings: LaneSettings) -> LayerGraph:
    """The second lane alone: what calibration reads its features from."""
    for apply in (add_taps, add_projection, add_second_lane, add_lane_norm, add_lane_head):
        graph = apply(graph, settings)
    return graph


def rewrite(graph: LayerGraph, settings: LaneSettings) -> LayerGraph:
    """The whole rewrite: second lane, probe and gate."""
    return add_gate(add_probe(rewrite_lane(graph, settings), settings), settings)


def add_taps(graph: LayerGraph, settings: LaneSettings) -> LayerGraph:
    """Keep the output of the safety and the semantic layer for every token; without projection, of the last block."""
    blocks = len(graph.of("block"))
    if settings.pair is None:
        last = graph[f"layers.{blocks - 1}"]
        if graph["norm"].inputs != (last.name,):
            raise RewriteError(
                f"{last.name}: the final norm reads something else than the last block's output, so a probe without "
                "projection would miss it. Export with the projection."
            )
        return graph.add(Node("sasa.last", "tap", (last.name,), last.module, {"of": "last", "index": blocks - 1}))
    safety, semantic = settings.pair
    if not 0 <= safety < semantic < blocks:
        raise RewriteError(
            f"safety layer {safety} and semantic layer {semantic} do not fit a decoder of {blocks} blocks: "
            f"0 <= safety layer < semantic layer <= {blocks - 1} must hold. "
            "Set --safety-layer and --semantic-layer (zero-based)."
        )
    for of, index in (("safety", safety), ("semantic", semantic)):
        block = graph[f"layers.{index}"]
        graph = graph.add(Node(f"sasa.{of}", "tap", (block.name,), block.module, {"of": of, "index": index}))
    return graph


def add_projection(graph: LayerGraph, settings: LaneSettings) -> LayerGraph:
    """Project the safety state onto the semantic state (the paper's Eq. 8); the result replaces h_s."""
    if settings.pair is None:
        return graph
    inputs = ("sasa.safety", "sasa.semantic")
    return graph.add(Node("sasa.projection", "projection", inputs, None, {"epsilon": settings.epsilon}))


def add_second_lane(graph: LayerGraph, settings: LaneSettings) -> LayerGraph:
    """Blocks s+1 .. L-1 once more, with the main lane's weights."""
    if settings.pair is None:
        return graph
    safety, blocks = settings.pair[0], graph.of("block")
    before, earliest = "sasa.projection", graph.earliest_safety_layer()
    if safety < earliest:
        # What is added between two blocks is no block's doing, so replaying blocks would lose it.
        possible = f"{earliest} is the first" if earliest < len(blocks) - 1 else "here there is none"
        raise RewriteError(
            f"{graph.of('between')[-1].name}: the model adds to the hidden state between blocks behind the safety "
            f"layer, {safety}, and the second lane would miss it. Choose a later --safety-layer: {possible} that can "
            "be."
        )
    for block in blocks[safety + 1 :]:
        name, index = f"sasa.lane.layers.{block.attributes['index']}", block.attributes["index"]
        graph = graph.add(Node(name, "lane_block", (before,), block.module, {"index": index}))
        before = name
    return graph


def add_lane_norm(graph: LayerGraph, settings: LaneSettings) -> LayerGraph:
    """The final norm of the lane, at the judged position alone; without a lane, of the main lane's end."""
    end = "sasa.last" if settings.pair is None else f"sasa.lane.layers.{len(graph.of('block')) - 1}"
    return graph.add(Node("sasa.lane.norm", "lane_norm", (end,), graph["norm"].module))


def add_lane_head(graph: LayerGraph, settings: LaneSettings) -> LayerGraph:
    """The head of the lane, where the probe cannot fold through it.

    z = W_head h, so w . z = (W_head^T w) . h: the probe folds exactly into the hidden dimension, and the lane needs no
    head. Where something non-linear follows the head, folding is not exact: the probe then reads logits.
    """
    if not graph.of("after_head"):
        return graph
    if settings.softcap is None:
        raise RewriteError(
            "after_head: the model changes its logits behind the head in a way that its configuration does not "
            "name (final_logit_softcapping), so the probe cannot read them. This model is not supported yet."
        )
    attributes = {"softcap": settings.softcap}
    return graph.add(Node("sasa.lane.head", "lane_head", ("sasa.lane.norm",), graph["head"].module, attributes))


def add_probe(graph: LayerGraph, settings: LaneSettings) -> LayerGraph:
    """The linear probe on the lane: P(unsafe) of the prompt."""
    end = "sasa.lane.head" if graph.of("lane_head") else "sasa.lane.norm"
    return graph.add(Node("sasa.probe", "probe", (end,), "sasa.probe"))


def add_gate(graph: LayerGraph, settings: LaneSettings) -> LayerGraph:
    """The gate on the logits: the model's own, or the next token of the refusal."""
    logits = "after_head" if graph.of("after_head") else "head"
    return graph.add(Node("sasa.gate", "gate", (logits, "sasa.probe")))
