"""The rewrite adds the steps of SASA to a traced graph. Each step reads the one before.

    tap -> projection -> second lane -> norm -> head (where it is not linear) -> probe -> gate

RewriteError names the node where settings do not fit the model.
"""

from dataclasses import dataclass
from typing import Any

from sasa_export.errors import RewriteError
from sasa_export.graph import LayerGraph
from sasa_export.options import REACH


@dataclass(frozen=True)
class LaneSettings:
    """Zero-based safety and semantic layer, the projection's epsilon, the head's logit soft cap if any, and the number
    of `tokens` that the second lane runs over: the judged token and those before it.

    Without layers, the model has no projection and no second lane: the probe reads the end of the main lane.
    """

    safety_layer: int | None
    semantic_layer: int | None
    epsilon: float = 1e-6
    softcap: float | None = None
    tokens: int = REACH

    @property
    def pair(self) -> tuple[int, int] | None:
        """Safety and semantic layer. None without a projection, and therefore without a second lane."""
        if self.safety_layer is None or self.semantic_layer is None:
            return None
        return self.safety_layer, self.semantic_layer


def rewrite(graph: LayerGraph, settings: LaneSettings) -> LayerGraph:
    """Return the rewritten graph: second lane, probe, and a gate that passes on the model's logits or the refusal's."""
    logits = "after_head" if graph.of("after_head") else "head"
    graph = rewrite_lane(graph, settings).add("sasa.probe", "probe", "sasa.probe")
    return graph.add("sasa.gate", "gate", None, (logits, "sasa.probe"))


def rewrite_lane(graph: LayerGraph, settings: LaneSettings) -> LayerGraph:
    """Return the graph with only the second lane, and its norm and head at the judged position, for calibration."""
    if settings.pair is None:
        graph = _with_end_of_main_lane(graph)
    else:
        _check_layers(graph, *settings.pair)
        graph = _with_second_lane(graph, *settings.pair, settings)
    graph = graph.add("sasa.lane.norm", "lane_norm", graph["norm"].module)
    # z = W_head h, so w . z = (W_head^T w) . h: the probe folds exactly into the hidden dimension, and the lane needs
    # no head. Where something non-linear follows the head, the probe reads logits.
    graph = _with_head(graph, settings) if graph.of("after_head") else graph
    return _with_states(graph) if settings.pair else graph


def _with_states(graph: LayerGraph) -> LayerGraph:
    """Let the probe also read the states of both layers at the judged position, after the final norm."""
    ends = [graph.nodes[-1].name]
    for of in ("safety", "semantic"):
        ends.append(f"sasa.{of}.norm")
        graph = graph.add(ends[-1], "state_norm", graph["norm"].module, (f"sasa.{of}",))
    return graph.add("sasa.read", "join", None, tuple(ends))


def _with_head(graph: LayerGraph, settings: LaneSettings) -> LayerGraph:
    if settings.softcap is None:
        raise RewriteError(
            "after_head: the model changes its logits behind the head in a way that its configuration does not "
            "name (final_logit_softcapping), so the probe cannot read them. This model is not supported yet."
        )
    return graph.add("sasa.lane.head", "lane_head", graph["head"].module, softcap=settings.softcap)


def _with_end_of_main_lane(graph: LayerGraph) -> LayerGraph:
    """Keep the output of the last block for a probe without projection."""
    last = graph.of("block")[-1]
    if graph["norm"].inputs != (last.name,):
        raise RewriteError(
            f"{last.name}: the final norm reads something else than the last block's output, so a probe without "
            "projection would miss it. Export with the projection."
        )
    return graph.add("sasa.last", "tap", last.module, (last.name,), of="last", index=last.attributes["index"])


def _check_layers(graph: LayerGraph, safety: int, semantic: int) -> None:
    """Raise RewriteError where a layer does not exist, or the model adds to states between the lane's blocks."""
    blocks, earliest = len(graph.of("block")), graph.earliest_safety_layer()
    if not 0 <= safety < semantic < blocks:
        raise RewriteError(
            f"safety layer {safety} and semantic layer {semantic} do not fit a decoder of {blocks} blocks: "
            f"0 <= safety layer < semantic layer <= {blocks - 1} must hold. "
            "Set --safety-layer and --semantic-layer (zero-based)."
        )
    if safety < earliest:
        # The second lane runs blocks alone, and would lose what is added between them.
        possible = f"{earliest} is the first" if earliest < blocks - 1 else "here there is none"
        raise RewriteError(
            f"{graph.of('between')[-1].name}: the model adds to the hidden state between blocks behind the safety "
            f"layer, {safety}, and the second lane would miss it. Choose a later --safety-layer: {possible} that can "
            "be."
        )


def _with_second_lane(graph: LayerGraph, safety: int, semantic: int, settings: LaneSettings) -> LayerGraph:
    """Keep the output of both layers for every token, and project the safety state onto the semantic state (the
    paper's Eq. 8). Run blocks safety + 1 .. L-1 once more on the projection, with the main lane's weights."""
    blocks = graph.of("block")
    for of, block in (("safety", blocks[safety]), ("semantic", blocks[semantic])):
        graph = graph.add(f"sasa.{of}", "tap", block.module, (block.name,), of=of, index=block.attributes["index"])
    said: dict[str, Any] = {"epsilon": settings.epsilon, "tokens": settings.tokens}
    graph = graph.add("sasa.projection", "projection", None, ("sasa.safety", "sasa.semantic"), **said)
    for block in blocks[safety + 1 :]:
        graph = graph.add(f"sasa.lane.{block.name}", "lane_block", block.module, index=block.attributes["index"])
    return graph
