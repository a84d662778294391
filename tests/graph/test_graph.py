"""The decoder as plain data, the passes that rewrite it, and its drawing."""

import itertools

import pytest

from sasa_export.errors import RewriteError
from sasa_export.graph import LayerGraph, Node
from sasa_export.graph.diagram import LABELS, mermaid
from sasa_export.graph.rewrite import LaneSettings, rewrite

SETTINGS = LaneSettings(1, 2, epsilon=1e-5)


def decoder(blocks: int = 4, *, between: int | None = None, after_head: bool = False) -> LayerGraph:
    """A decoder by hand; `between` puts an addition behind that block."""
    graph = LayerGraph((Node("embed", "embed", (), "embed_tokens"),))
    for index in range(blocks):
        graph = graph.add(f"layers.{index}", "block", f"layers.{index}", index=index)
        if index == between:
            graph = graph.add(f"between.{index}.{index + 1 if index + 1 < blocks else 'norm'}", "between")
    graph = graph.add("norm", "norm", "norm").add("head", "head", "lm_head")
    return graph.add("after_head", "after_head") if after_head else graph


def test_the_rewritten_graph() -> None:
    """Four blocks, s = 1, f = 2: exactly these nodes, each with its module, inputs and attributes."""
    graph = rewrite(decoder(), SETTINGS)
    assert graph.nodes[:7] == decoder().nodes
    assert graph.nodes[2] == Node("layers.1", "block", ("layers.0",), "layers.1", {"index": 1})
    assert list(graph.nodes[7:]) == [
        Node("sasa.safety", "tap", ("layers.1",), "layers.1", {"of": "safety", "index": 1}),
        Node("sasa.semantic", "tap", ("layers.2",), "layers.2", {"of": "semantic", "index": 2}),
        Node("sasa.projection", "projection", ("sasa.safety", "sasa.semantic"), None, {"epsilon": 1e-5, "tokens": 8}),
        Node("sasa.lane.layers.2", "lane_block", ("sasa.projection",), "layers.2", {"index": 2}),
        Node("sasa.lane.layers.3", "lane_block", ("sasa.lane.layers.2",), "layers.3", {"index": 3}),
        Node("sasa.lane.norm", "lane_norm", ("sasa.lane.layers.3",), "norm"),
        Node("sasa.safety.norm", "state_norm", ("sasa.safety",), "norm"),
        Node("sasa.semantic.norm", "state_norm", ("sasa.semantic",), "norm"),
        Node("sasa.read", "join", ("sasa.lane.norm", "sasa.safety.norm", "sasa.semantic.norm")),
        Node("sasa.probe", "probe", ("sasa.read",), "sasa.probe"),
        Node("sasa.gate", "gate", ("head", "sasa.probe")),
    ]


def test_a_lane_over_the_last_tokens_alone() -> None:
    graph = rewrite(decoder(), LaneSettings(1, 2, tokens=5))
    assert graph["sasa.projection"].attributes == {"epsilon": 1e-6, "tokens": 5}
    assert "projection, last 5 tokens" in boxes(mermaid(graph)).values()


def test_no_projection_where_something_is_added_behind_the_last_block() -> None:
    """The probe reads the output of that block, behind the norm, which must read it too."""
    with pytest.raises(RewriteError, match=r"layers\.3: the final norm reads something else"):
        rewrite(decoder(between=3), LaneSettings(None, None))


@pytest.mark.parametrize("safety, semantic", [(2, 2), (3, 1), (1, 4), (-1, 2)])
def test_taps_need_layers_in_range(safety: int, semantic: int) -> None:
    said = rf"safety layer {safety} and semantic layer {semantic} .*0 <= safety layer < semantic layer <= 3 must hold"
    with pytest.raises(RewriteError, match=said):
        rewrite(decoder(), LaneSettings(safety, semantic))


def test_a_cap_that_is_not_applied_changes_nothing() -> None:
    """What the model does counts, not what its configuration says."""
    assert rewrite(decoder(), LaneSettings(1, 2, 1e-5, softcap=30.0)) == rewrite(decoder(), SETTINGS)


def boxes(drawing: str) -> dict[str, str]:
    """The labels of the boxes by their names."""
    return dict(line.strip().removesuffix('"]').split('["') for line in drawing.splitlines() if '["' in line)


def test_the_drawing() -> None:
    """Runs of blocks are cut where something reads from the middle; an arrow is a pair of labels."""
    drawing = mermaid(rewrite(decoder(8), LaneSettings(2, 4)))
    labels = boxes(drawing)
    pairs = [line.strip().split(" --> ") for line in drawing.splitlines() if " --> " in line]
    lane = "second lane: blocks 3 to 7"
    main = [LABELS["embed"], "blocks 0 to 2", "blocks 3 to 4", "blocks 5 to 7", "final norm", "head", "gate"]
    read = ["final norm, judged position", "side by side"]
    projection = "projection, last 8 tokens"
    own = [projection, lane, *read, "probe", "gate"]
    taps = ["blocks 0 to 2", "safety layer 2", projection], ["blocks 3 to 4", "semantic layer 4", projection]
    states = ["safety layer 2", *read], ["semantic layer 4", *read]
    expected = [pair for path in (main, own, *taps, *states) for pair in itertools.pairwise(path)]
    assert sorted((labels[start], labels[end]) for start, end in pairs) == sorted(expected)
    (coloured,) = [line.split()[1].split(",") for line in drawing.splitlines() if line.strip().startswith("class ")]
    assert sorted(coloured) == sorted(list(labels)[6:]), "what SASA adds is coloured"
