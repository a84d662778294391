"""The decoder as plain data, the passes that rewrite it, and its drawing."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sasa_export.errors import RewriteError
from sasa_export.graph import LayerGraph, Node
from sasa_export.graph.diagram import LABELS, mermaid
from sasa_export.graph.rewrite import (
    LaneSettings,
    add_gate,
    add_lane_head,
    add_lane_norm,
    add_probe,
    add_projection,
    add_second_lane,
    add_taps,
    rewrite,
    rewrite_lane,
)

Pass = Callable[[LayerGraph, LaneSettings], LayerGraph]

SETTINGS = LaneSettings(1, 2, epsilon=1e-5)
EMBED = LABELS["embed"]


def decoder(blocks: int = 4, *, between: int | None = None, after_head: bool = False) -> LayerGraph:
    """A decoder by hand; `between` puts an addition behind that block."""
    nodes = [Node("embed", "embed", (), "embed_tokens")]
    for index in range(blocks):
        before = nodes[-1].name
        nodes.append(
            Node(
                f"layers.{index}",
                "block",
                (before,),
                f"layers.{index}",
                {"index": index, "arguments": {"mask": "None"}},
            )
        )
        if index == between:
            following = index + 1 if index + 1 < blocks else "norm"
            nodes.append(Node(f"between.{index}.{following}", "between", (f"layers.{index}",)))
    nodes.append(Node("norm", "norm", (nodes[-1].name,), "norm"))
    nodes.append(Node("head", "head", ("norm",), "lm_head"))
    if after_head:
        nodes.append(Node("after_head", "after_head", ("head",)))
    return LayerGraph(tuple(nodes))


def without(graph: LayerGraph, name: str) -> LayerGraph:
    """The graph less one node and whatever reads it."""
    gone = {name}
    for node in graph:
        if gone & set(node.inputs):
            gone.add(node.name)
    return LayerGraph(tuple(node for node in graph if node.name not in gone))


# ------------------------------------------------------------------------------------------------ the data


def test_a_node_comes_after_what_it_reads() -> None:
    embed, block = Node("embed", "embed"), Node("layers.0", "block", ("embed",))
    LayerGraph((embed, block))
    with pytest.raises(ValueError, match=r"layers\.0"):
        LayerGraph((block, embed))
    with pytest.raises(ValueError, match=r"layers\.0"):
        LayerGraph((block,))
    with pytest.raises(ValueError, match=r"layers\.0"):
        LayerGraph((embed,)).add(Node("layers.0", "block", ("layers.0",)))


def test_names_are_unique() -> None:
    with pytest.raises(ValueError, match="embed"):
        LayerGraph((Node("embed", "embed"), Node("embed", "embed")))
    with pytest.raises(ValueError, match=r"layers\.1"):
        decoder().add(Node("layers.1", "block", ("embed",)))


def test_operations_are_known() -> None:
    with pytest.raises(ValueError, match="convolution"):
        LayerGraph((Node("x", "convolution"),))


def test_a_graph_is_not_changed_by_what_is_made_of_it() -> None:
    graph = decoder()
    before = graph.to_json()
    longer = rewrite(graph, SETTINGS)
    assert graph.to_json() == before
    assert longer.nodes[: len(graph.nodes)] == graph.nodes


def test_looking_up_nodes() -> None:
    graph = decoder()
    assert graph["layers.2"].attributes["index"] == 2
    assert [node.name for node in graph.of("block")] == ["layers.0", "layers.1", "layers.2", "layers.3"]
    assert graph.of("gate") == ()
    with pytest.raises(KeyError, match=r"layers\.4"):
        graph["layers.4"]


@given(
    st.integers(2, 12).flatmap(
        lambda blocks: st.tuples(
            st.just(blocks),
            st.lists(st.integers(0, blocks - 1), min_size=2, max_size=2, unique=True).map(sorted),
            st.booleans(),
        )
    )
)
def test_round_trip_through_json(drawn: tuple[int, list[int], bool]) -> None:
    """What config.json stores is read back as it was, and the lane is always blocks s+1 to the last."""
    blocks, (safety, semantic), capped = drawn
    graph = rewrite(decoder(blocks, after_head=capped), LaneSettings(safety, semantic, softcap=3.0))
    assert LayerGraph.from_json(json.loads(json.dumps(graph.to_json()))) == graph
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


def test_calibration_reads_the_lane_alone() -> None:
    lane = rewrite_lane(decoder(), SETTINGS)
    assert lane.nodes[-1].name == "sasa.lane.norm"
    assert rewrite(decoder(), SETTINGS).nodes[: len(lane.nodes)] == lane.nodes


@pytest.mark.parametrize("safety, semantic", [(2, 2), (3, 1), (1, 4), (-1, 2), (4, 5), (-2, -1)])
def test_taps_need_layers_in_range(safety: int, semantic: int) -> None:
    with pytest.raises(RewriteError, match=r"0 <= safety layer < semantic layer <= 3 must hold") as caught:
        add_taps(decoder(), LaneSettings(safety, semantic))
    assert f"safety layer {safety} and semantic layer {semantic}" in str(caught.value)


def stages() -> dict[Pass, LayerGraph]:
    """Each pass, and the graph that it is given in a rewrite."""
    graph = decoder()
    given: dict[Pass, LayerGraph] = {}
    for apply in (add_taps, add_projection, add_second_lane, add_lane_norm, add_probe, add_gate):
        given[apply] = graph
        graph = apply(graph, SETTINGS)
    given[add_lane_head] = decoder(after_head=True).add(*rewrite_lane(decoder(), SETTINGS).nodes[7:])
    return given


@pytest.mark.parametrize(
    "apply, missing",
    [
        (add_projection, "sasa.safety"),
        (add_projection, "sasa.semantic"),
        (add_second_lane, "sasa.projection"),
        (add_lane_norm, "sasa.lane.layers.3"),
        (add_lane_head, "sasa.lane.norm"),
        (add_probe, "sasa.lane.norm"),
        (add_gate, "sasa.probe"),
        (add_gate, "head"),
    ],
)
def test_each_pass_names_the_node_that_it_misses(apply: Pass, missing: str) -> None:
    graph = stages()[apply]
    settings = LaneSettings(1, 2, softcap=5.0)
    apply(graph, settings)
    with pytest.raises(RewriteError, match=rf"\b{missing}\b"):
        apply(without(graph, missing), settings)


def test_taps_name_the_block_that_they_miss() -> None:
    nodes = [Node("embed", "embed"), *(Node(f"odd.{n}", "block", (), None, {"index": n}) for n in range(4))]
    with pytest.raises(RewriteError, match=r"layers\.1\b"):
        add_taps(LayerGraph(tuple(nodes)), SETTINGS)


def test_the_lanes_norm_needs_the_norm() -> None:
    nodes = [node for node in rewrite_lane(decoder(), SETTINGS) if node.name not in ("norm", "head", "sasa.lane.norm")]
    with pytest.raises(RewriteError, match=r"\bnorm\b"):
        add_lane_norm(LayerGraph(tuple(nodes)), SETTINGS)


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


@pytest.mark.parametrize("apply", [add_taps, add_projection, add_second_lane, add_lane_norm, add_probe, add_gate])
def test_no_pass_applies_twice(apply: Pass) -> None:
    once = apply(stages()[apply], SETTINGS)
    with pytest.raises((RewriteError, ValueError)):
        apply(once, SETTINGS)


# ---------------------------------------------------------------------------------------------- the drawing


def boxes(drawing: str) -> list[str]:
    return [line.split('["')[1].removesuffix('"]') for line in drawing.splitlines() if '["' in line]


def arrows(drawing: str) -> set[tuple[str, str]]:
    """The arrows as pairs of labels."""
    lines = [line.strip() for line in drawing.splitlines()]
    labels = dict(line.removesuffix('"]').split('["') for line in lines if '["' in line)
    pairs = [line.split(" --> ") for line in lines if " --> " in line]
    return {(labels[start], labels[end]) for start, end in pairs}


def test_a_run_of_blocks_is_one_box() -> None:
    drawing = mermaid(decoder())
    assert drawing.startswith("flowchart TD\n")
    assert boxes(drawing) == [EMBED, "blocks 0 to 3", "final norm", "head"]
    assert drawing.count("-->") == 3 and "class " not in drawing


def test_runs_are_cut_where_something_reads_from_the_middle() -> None:
    drawing = mermaid(rewrite(decoder(8), LaneSettings(2, 4)))
    assert boxes(drawing) == [
        EMBED,
        "blocks 0 to 2",
        "blocks 3 to 4",
        "blocks 5 to 7",
        "final norm",
        "head",
        "safety layer 2",
        "semantic layer 4",
        "projection",
        "second lane: blocks 3 to 7",
        "final norm, last position",
        "probe",
        "gate",
    ]
    assert arrows(drawing) == {
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
        ("second lane: blocks 3 to 7", "final norm, last position"),
        ("final norm, last position", "probe"),
        ("probe", "gate"),
        ("head", "gate"),
    }


def test_neighbouring_layers_and_single_blocks() -> None:
    drawing = mermaid(rewrite(decoder(), LaneSettings(2, 3)))
    assert boxes(drawing)[1:3] == ["blocks 0 to 2", "block 3"]
    assert "second lane: block 3" in boxes(drawing)


def test_what_sasa_adds_is_coloured() -> None:
    drawing = mermaid(rewrite(decoder(), SETTINGS))
    lines = [line.strip() for line in drawing.splitlines()]
    (coloured,) = [line for line in lines if line.startswith("class ")]
    names = coloured.split()[1].split(",")
    labels = dict(line.removesuffix('"]').split('["') for line in lines if '["' in line)
    assert [labels[name] for name in names] == boxes(drawing)[boxes(drawing).index("safety layer 1") :]
    assert len(set(names)) == len(names)


def test_additions_and_caps_are_drawn() -> None:
    drawing = mermaid(rewrite(decoder(between=0, after_head=True), LaneSettings(1, 2, softcap=3.0)))
    drawn = boxes(drawing)
    assert any("between.0.1" in label for label in drawn)
    assert "what follows the head" in drawn and "head" in drawn
    assert len(arrows(drawing)) == drawing.count("-->")
