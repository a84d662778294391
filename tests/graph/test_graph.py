"""The decoder as plain data, the passes that rewrite it, and its drawing."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sasa_export.errors import RewriteError
from sasa_export.graph import LayerGraph, Node
from sasa_export.graph.diagram import LABELS, mermaid
from sasa_export.graph.rewrite import LaneSettings, rewrite

SETTINGS = LaneSettings(1, 2, epsilon=1e-5)
EMBED = LABELS["embed"]


def decoder(blocks: int = 4, *, between: int | None = None, after_head: bool = False) -> LayerGraph:
    """A decoder by hand; `between` puts an addition behind that block."""
    nodes = [Node("embed", "embed", (), "embed_tokens")]
    for index in range(blocks):
        before = nodes[-1].name
        nodes.append(Node(f"layers.{index}", "block", (before,), f"layers.{index}", {"index": index}))
        if index == between:
            following = index + 1 if index + 1 < blocks else "norm"
            nodes.append(Node(f"between.{index}.{following}", "between", (f"layers.{index}",)))
    nodes.append(Node("norm", "norm", (nodes[-1].name,), "norm"))
    nodes.append(Node("head", "head", ("norm",), "lm_head"))
    if after_head:
        nodes.append(Node("after_head", "after_head", ("head",)))
    return LayerGraph(tuple(nodes))


# ------------------------------------------------------------------------------------------------ the data


@given(
    st.integers(2, 12).flatmap(
        lambda blocks: st.tuples(
            st.just(blocks),
            st.lists(st.integers(0, blocks - 1), min_size=2, max_size=2, unique=True).map(sorted),
            st.booleans(),
        )
    )
)
def test_the_lane_is_always_blocks_behind_the_safety_layer(drawn: tuple[int, list[int], bool]) -> None:
    """s+1 to the last; a node reads what stands before it, and all of it goes into config.json."""
    blocks, (safety, semantic), capped = drawn
    graph = rewrite(decoder(blocks, after_head=capped), LaneSettings(safety, semantic, softcap=3.0))
    for place, node in enumerate(json.loads(json.dumps(graph.to_json()))):
        assert set(node["inputs"]) <= {before.name for before in graph.nodes[:place]}
    lane = graph.of("lane_block")
    assert [node.attributes["index"] for node in lane] == list(range(safety + 1, blocks))
    assert [node.module for node in lane] == [f"layers.{index}" for index in range(safety + 1, blocks)]
    taps = {node.attributes["of"]: node.attributes["index"] for node in graph.of("tap")}
    assert taps == {"safety": safety, "semantic": semantic}


# ---------------------------------------------------------------------------------------------- the rewrite


def test_the_rewritten_graph() -> None:
    """Four blocks, s = 1, f = 2: exactly these nodes, each with its module, inputs and attributes."""
    graph = rewrite(decoder(), SETTINGS)
    assert graph.nodes[:7] == decoder().nodes
    assert list(graph.nodes[7:]) == [
        Node("sasa.safety", "tap", ("layers.1",), "layers.1", {"of": "safety", "index": 1}),
        Node("sasa.semantic", "tap", ("layers.2",), "layers.2", {"of": "semantic", "index": 2}),
        Node("sasa.projection", "projection", ("sasa.safety", "sasa.semantic"), None, {"epsilon": 1e-5}),
        Node("sasa.lane.layers.2", "lane_block", ("sasa.projection",), "layers.2", {"index": 2}),
        Node("sasa.lane.layers.3", "lane_block", ("sasa.lane.layers.2",), "layers.3", {"index": 3}),
        Node("sasa.lane.norm", "lane_norm", ("sasa.lane.layers.3",), "norm"),
        Node("sasa.probe", "probe", ("sasa.lane.norm",), "sasa.probe"),
        Node("sasa.gate", "gate", ("head", "sasa.probe")),
    ]


def test_the_rewritten_graph_where_logits_are_capped() -> None:
    """The probe then reads the lane's capped logits, and the gate sits behind the cap."""
    graph = rewrite(decoder(after_head=True), LaneSettings(0, 3, softcap=30.0))
    assert [node.name for node in graph.of("lane_block")] == [f"sasa.lane.layers.{index}" for index in (1, 2, 3)]
    assert list(graph.nodes[-3:]) == [
        Node("sasa.lane.head", "lane_head", ("sasa.lane.norm",), "lm_head", {"softcap": 30.0}),
        Node("sasa.probe", "probe", ("sasa.lane.head",), "sasa.probe"),
        Node("sasa.gate", "gate", ("after_head", "sasa.probe")),
    ]


def test_no_projection() -> None:
    """The probe then reads the main lane's last block, behind the norm, which must read that block too."""
    graph = rewrite(decoder(), LaneSettings(None, None))
    assert list(graph.nodes[7:]) == [
        Node("sasa.last", "tap", ("layers.3",), "layers.3", {"of": "last", "index": 3}),
        Node("sasa.lane.norm", "lane_norm", ("sasa.last",), "norm"),
        Node("sasa.probe", "probe", ("sasa.lane.norm",), "sasa.probe"),
        Node("sasa.gate", "gate", ("head", "sasa.probe")),
    ]
    with pytest.raises(RewriteError, match=r"layers\.3: the final norm reads something else"):
        rewrite(decoder(between=3), LaneSettings(None, None))


@pytest.mark.parametrize("safety, semantic", [(2, 2), (3, 1), (1, 4), (-1, 2), (4, 5), (-2, -1)])
def test_taps_need_layers_in_range(safety: int, semantic: int) -> None:
    with pytest.raises(RewriteError, match=r"0 <= safety layer < semantic layer <= 3 must hold") as caught:
        rewrite(decoder(), LaneSettings(safety, semantic))
    assert f"safety layer {safety} and semantic layer {semantic}" in str(caught.value)


def test_what_follows_the_head_must_be_known() -> None:
    """Logits that change behind the head, in a way that no setting names, cannot be read by a probe."""
    with pytest.raises(RewriteError, match=r"after_head: .*final_logit_softcapping"):
        rewrite(decoder(after_head=True), LaneSettings(1, 2))


def test_a_cap_that_is_not_applied_changes_nothing() -> None:
    """What the model does counts, not what its configuration says."""
    assert rewrite(decoder(), LaneSettings(1, 2, 1e-5, softcap=30.0)) == rewrite(decoder(), SETTINGS)


@pytest.mark.parametrize("behind", [1, 2, 3])
def test_additions_behind_the_safety_layer_cannot_be_replayed(behind: int) -> None:
    graph = decoder(between=behind)
    (added,) = graph.of("between")
    with pytest.raises(RewriteError, match=rf"{added.name}: .*--safety-layer"):
        rewrite(graph, SETTINGS)


def test_additions_before_the_safety_layer_are_the_main_lanes_business() -> None:
    graph = rewrite(decoder(between=0), SETTINGS)
    assert graph["layers.1"].inputs == ("between.0.1",)
    assert [node.name for node in graph.of("lane_block")] == ["sasa.lane.layers.2", "sasa.lane.layers.3"]


# ---------------------------------------------------------------------------------------------- the drawing


def boxes(drawing: str) -> dict[str, str]:
    """The labels of the boxes by their names."""
    return dict(line.strip().removesuffix('"]').split('["') for line in drawing.splitlines() if '["' in line)


def arrows(drawing: str) -> list[tuple[str, str]]:
    """The arrows as pairs of labels."""
    labels = boxes(drawing)
    pairs = [line.strip().split(" --> ") for line in drawing.splitlines() if " --> " in line]
    return [(labels[start], labels[end]) for start, end in pairs]


def test_runs_of_blocks_are_cut_where_something_reads_from_the_middle() -> None:
    drawing = mermaid(rewrite(decoder(8), LaneSettings(2, 4)))
    assert drawing.startswith("flowchart TD\n")
    assert sorted(arrows(drawing)) == sorted(
        [
            (EMBED, "blocks 0 to 2"),
            ("blocks 0 to 2", "blocks 3 to 4"),
            ("blocks 3 to 4", "blocks 5 to 7"),
            ("blocks 5 to 7", "final norm"),
            ("final norm", "head"),
            ("blocks 0 to 2", "safety layer 2"),
            ("blocks 3 to 4", "semantic layer 4"),
            ("safety layer 2", "projection"),
            ("semantic layer 4", "projection"),
            ("projection", "second lane: blocks 3 to 7"),
            ("second lane: blocks 3 to 7", "final norm, judged position"),
            ("final norm, judged position", "probe"),
            ("probe", "gate"),
            ("head", "gate"),
        ]
    )
    (coloured,) = [line.split()[1].split(",") for line in drawing.splitlines() if line.strip().startswith("class ")]
    assert sorted(coloured) == sorted(list(boxes(drawing))[6:]), "what SASA adds is coloured"


def test_other_drawings() -> None:
    """A plain decoder, neighbouring layers, additions between blocks and what follows the head."""
    plain = mermaid(decoder())
    assert list(boxes(plain).values()) == [EMBED, "blocks 0 to 3", "final norm", "head"] and "class " not in plain
    near = list(boxes(mermaid(rewrite(decoder(), LaneSettings(2, 3)))).values())
    assert near[1:3] == ["blocks 0 to 2", "block 3"] and "second lane: block 3" in near
    odd = boxes(mermaid(rewrite(decoder(between=0, after_head=True), LaneSettings(1, 2, softcap=3.0)))).values()
    assert any("between.0.1" in label for label in odd) and {"head", "what follows the head"} <= set(odd)
