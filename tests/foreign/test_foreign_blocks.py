"""Graphs that others exported: blocks are found for certain, or an error names the node, and nothing is written."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import foreign_graphs
import numpy as np
import onnx_ir as ir
import pytest
from foreign_runner import GraphOracle
from onnx_runner import session

import sasa_export
from sasa_export.backends.onnx_graphs import GraphOriginal
from sasa_export.errors import OpenError, SasaExportError, TraceError
from sasa_export.graph.rewrite import LaneSettings
from sasa_export.onnx.blocks import Blocks, find_blocks
from sasa_export.onnx.lane import add_lane
from sasa_export.onnx.opened import holds_graphs, open_graphs

PAIR = LaneSettings(1, 2)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foreign_graphs.write(tmp_path_factory.mktemp("foreign"))


@pytest.fixture(scope="module")
def blocks() -> Blocks:
    return find_blocks(ir.from_proto(foreign_graphs.decoder()), foreign_graphs.BLOCKS)


def test_blocks_norm_and_head_are_found(blocks: Blocks) -> None:
    assert [state.name for state in blocks.states] == [f"state.{index}" for index in range(foreign_graphs.BLOCKS)]
    assert blocks.head.op_type == "MatMul" and blocks.linear
    assert blocks.norm is blocks.read is blocks.head.inputs[0]


def test_what_is_told_of_a_states_size_alone_goes_past_no_block() -> None:
    """As in OPT, where blocks take a shape from what lies before their end."""
    model = ir.from_proto(foreign_graphs.decoder())
    nodes = list(model.graph)
    end = next(node for node in nodes if any(value.name == "state.0" for value in node.outputs))
    head = next(node for node in nodes if any(value.name == "logits" for value in node.outputs))
    shape = ir.node("Shape", [end.inputs[1]])
    again = ir.node("Reshape", [head.inputs[0], shape.outputs[0]])
    model.graph.insert_before(head, [shape, again])
    head.replace_input_with(0, again.outputs[0])
    found = find_blocks(model, foreign_graphs.BLOCKS)
    assert [value.name for value in found.states] == [f"state.{index}" for index in range(foreign_graphs.BLOCKS)]


def test_a_head_that_is_not_linear_is_seen() -> None:
    assert not find_blocks(ir.from_proto(foreign_graphs.decoder("soft cap")), None).linear


def test_the_second_lane_ends_where_the_main_lane_ends(directory: Path) -> None:
    assert GraphOriginal(str(directory)).check_lane(PAIR).endswith("ends 0e+00 from it")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            lambda blocks, safety, states, prefix: blocks.norm,
            "begun with what lies behind block 1, .* another state 0\\.0",
        ),
        (lambda blocks, safety, states, prefix: add_lane(blocks, safety + 1, states, prefix=prefix), "begun with"),
    ],
    ids=["reads the main lane", "begins elsewhere"],
)
def test_a_wrong_lane_is_noticed(wrong: Any, said: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sasa_export.onnx.decoder.add_lane", wrong)
    with pytest.raises(TraceError, match=rf"state\.1: {said}"):
        GraphOriginal(str(directory)).check_lane(PAIR)


def test_the_heads_weights_are_what_it_multiplies_by(directory: Path) -> None:
    (weight,) = (
        value
        for value in find_blocks(ir.load(directory / "model.onnx"), None).head.inputs
        if value and value.const_value
    )
    assert weight.const_value is not None
    np.testing.assert_allclose(GraphOriginal(str(directory)).head_weight(), weight.const_value.numpy().T, atol=1e-6)


@pytest.mark.parametrize("reach", [3, 5, 8])
def test_features_are_those_of_two_passes(directory: Path, reach: int) -> None:
    """The second lane's end, and the states of both layers behind the final norm, in this order."""
    ids, pair, original = [5, 9, 70, 33, 8], (1, 2), GraphOriginal(str(directory))
    inputs = {"input_ids": np.array([ids])}
    found = original.lanes(replace(PAIR, tokens=reach)).prompt(inputs)
    oracle, normed = GraphOracle(directory, pair), original.behind_blocks().prompt(inputs)["normed"].numpy()[0]
    features = np.concatenate([oracle.end(ids, pair, reach)[0], *normed[list(pair)]])  # (3 * hidden,)
    np.testing.assert_allclose(found["projected"].numpy()[0], features, atol=1e-5)
    np.testing.assert_allclose(found["plain"].numpy()[0], oracle.plain(ids), atol=1e-5)


FAULTS = {
    "shared keys": "a cache for 3 blocks, and its configuration names 4",
    "cross-attention": "the decoder has the input encoder_hidden_states",
    "merged": r"/merged \(If\) holds the decoder in branches",
    "dynamic int8": r"/rounded \(DynamicQuantizeLinear\): dynamic int8 has one range",
    "unknown operator": "FlashNorm",
    "guarded already": "an output unsafe_probability: it is guarded already",
    "text again": r"/text\.again \(Add\): behind block 1 the decoder reads its text once more",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_guarded_ends_in_a_line_that_says_why(fault: str, tmp_path: Path) -> None:
    source = foreign_graphs.write(tmp_path / "source", fault)
    options = foreign_graphs.options(source, tmp_path, verify="files")
    with pytest.raises(SasaExportError, match=FAULTS[fault]) as caught:
        sasa_export.patch(options)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["probe", "source"]


def test_options_of_torch_are_no_options_of_graphs(directory: Path, tmp_path: Path) -> None:
    for given in (
        {"opset": 20, "format": "onnx"},
        {"format": "both"},
        {"projection": "none"},
    ):
        options = sasa_export.Options(model=str(directory), out=tmp_path / "out", **given)
        with pytest.raises(SasaExportError, match="not of use with ONNX graphs"):
            sasa_export.patch(options)


def test_variants_are_chosen_by_file_or_by_type(tmp_path: Path) -> None:
    for name in (
        "decoder_model_merged.onnx",
        "decoder_model_merged_q4.onnx",
        "embed_tokens_q4.onnx",
        "embed_tokens.onnx",
    ):
        foreign_graphs.write(tmp_path, name=f"onnx/{name}")
    model = str(tmp_path)
    assert holds_graphs(model)
    with pytest.raises(
        OpenError, match=re.escape("onnx/decoder_model_merged.onnx, onnx/decoder_model_merged_q4.onnx: choose")
    ):
        open_graphs(model)
    decoder, embedding = "onnx/decoder_model_merged{}.onnx", "onnx/embed_tokens{}.onnx"
    for chosen, (first, second) in {
        ("q4",): ("_q4", "_q4"), ("fp32",): ("", ""),
        ("decoder_model_merged_q4.onnx", "embed_tokens.onnx"): ("_q4", ""),
    }.items():  # fmt: skip
        files = open_graphs(model, chosen).files
        assert files == {"decoder": decoder.format(first), "embedding": embedding.format(second)}
    with pytest.raises(OpenError, match="--onnx-file q8 is none of the graphs"):
        open_graphs(model, ("q4", "q8"))


@pytest.mark.slow
def test_links_of_the_hubs_cache_are_followed_and_none_is_written(directory: Path, tmp_path: Path) -> None:
    """A snapshot holds links to blobs, and onnxruntime takes no weights from outside of a graph's folder."""
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(path for path in directory.iterdir() if path.is_file()):
        (blobs / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    options = foreign_graphs.options(snapshot, tmp_path, verify="files")
    sasa_export.patch(options)
    written = [path for path in options.out.rglob("*") if not path.is_dir()]
    assert not any(path.is_symlink() for path in written)
    assert (options.out / "model.onnx_data").read_bytes() == (directory / "model.onnx_data").read_bytes()
    assert session(options.out / "model.onnx").get_outputs()


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.onnx_data"])
def test_a_missing_file_is_an_error_by_name(name: str, tmp_path: Path) -> None:
    directory = foreign_graphs.write(tmp_path / "source")
    (directory / name).unlink()
    with pytest.raises(OpenError, match=re.escape(name)):
        GraphOriginal(str(directory))
