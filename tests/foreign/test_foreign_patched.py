"""A patched graph of single operators: lanes over the last tokens, caches as runtimes keep them, and its directory."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_steps import flags, succeeds, write_lane_probe
from foreign_graphs import BLOCKS, HEADS, HIDDEN, SIZE
from foreign_runner import Decoder, padded
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException
from test_foreign_graphs import HAND, REFUSAL, Case, case

from sasa_export.errors import OpenError
from sasa_export.onnx.opened import open_graphs
from sasa_export.verify import verify_directory

__all__ = ["case"]  # a fixture
pytestmark = pytest.mark.xdist_group("foreign")


@pytest.fixture(scope="module")
def it(case: Any) -> Case:
    found: Case = case(HAND)
    return found


@pytest.mark.parametrize("reach", [4, 40])
def test_a_lane_over_the_last_tokens(it: Case, reach: int, tmp_path: Path) -> None:
    """P(unsafe) is that of two passes, the second on these tokens alone at their own positions; whole, in pieces, and
    in batches with pads on either side, in which some rows have fewer."""
    assert min(map(len, it.rows)) < 40 < max(map(len, it.rows))
    probe = write_lane_probe(tmp_path / "probe", it.probe.weight, HIDDEN, it.probe.bias)
    options = {"safety_layer": 1, "semantic_layer": 2, "lane_tokens": reach, "refusal": REFUSAL, "verify": "files"}
    succeeds(*flags(it.original, tmp_path / f"out{reach}", probe=probe, **options))
    patched = tmp_path / f"out{reach}"
    expected = [it.probe.judge(ids, reach) for ids in it.rows]
    apart = np.abs(np.array(expected) - it.probe.expected)  # of a lane over all tokens
    assert apart.max() > 10 * it.tolerance and all(apart[[len(ids) <= reach for ids in it.rows]] < it.tolerance)
    for side in ("left", "right"):
        assert it.ask(patched, *padded(it.rows, side, 0)).probability == pytest.approx(expected, abs=it.tolerance)
    for ids, wanted in zip(it.rows, expected, strict=True):
        count = len(ids)
        for ends in ([count // 2, count - 1, count], range(1, count + 1)):
            asked = it.ask(patched, ids[: ends[0]])
            for start, end in pairwise(ends):
                asked.call(np.array([ids[start:end]]))
            assert asked.probability == pytest.approx([wanted], abs=it.tolerance)


def of_the_ledger(asked: Decoder) -> list[str]:
    """The names of the cache's layers behind those of the blocks."""
    return [name for name in asked.cache if int(name.split(".")[1]) >= BLOCKS]


def test_a_second_turn_of_a_padded_batch(it: Case) -> None:
    ids, mask = padded(it.rows, "left", 0)
    turn = np.tile(it.rows[0], (len(it.rows), 1))
    asked = it.ask(it.patched, ids, mask)
    asked.call(turn)
    whole = it.ask(it.patched, np.concatenate([ids, turn], 1), np.concatenate([mask, np.ones_like(turn)], 1))
    np.testing.assert_allclose(asked.probability, whole.probability, atol=1e-5)


def test_buffers_longer_than_what_they_hold_come_back_as_long(it: Case) -> None:
    """As onnxruntime-genai shares them; the decoder's own cache here grows, so that only the ledger's are long."""
    ids = it.rows[0]
    asked = Decoder(it.patched)
    asked.start(1)
    asked.cache |= dict.fromkeys(of_the_ledger(asked), np.full((1, HEADS, 60, SIZE), 7.0, np.float32))
    for piece in (ids[:-4], ids[-4:]):
        asked.call(np.array([piece]))
        assert asked.cache[of_the_ledger(asked)[0]].shape[2] == 60
    assert (asked.cache[of_the_ledger(asked)[0]][:, :, len(ids) :] == 7.0).all()
    assert asked.probability == pytest.approx([it.probe.expected[0]], abs=1e-5)


def test_a_cache_without_the_ledger_is_an_error(it: Case) -> None:
    asked = it.ask(it.patched, it.rows[0])
    for name in of_the_ledger(asked):
        asked.cache[name] = asked.cache[name][:, :, :0]
    with pytest.raises((Fail, InvalidArgument, RuntimeException)):
        asked.call(np.array([it.rows[0]]))


def test_the_directory_says_what_it_is(it: Case) -> None:
    assert json.loads((it.patched / "config.json").read_text())["num_hidden_layers"] > BLOCKS
    assert all(check.passed for check in verify_directory(it.patched))
    with pytest.raises(OpenError, match="a patched model already"):
        open_graphs(str(it.patched))


def test_a_changed_graph_fails_its_verification(it: Case, tmp_path: Path) -> None:
    shutil.copytree(it.patched, tmp_path / "copy")
    cases = tmp_path / "copy" / "sasa-verify" / "cases.json"
    said = json.loads(cases.read_text())
    said["cases"][0]["unsafe_probability"] += 0.1
    cases.write_text(json.dumps(said))
    assert not all(check.passed for check in verify_directory(tmp_path / "copy"))


def test_the_lane_lies_in_a_branch(it: Case) -> None:
    """A token's call enters none of it."""
    graph = onnx.load(it.patched / "model.onnx", load_external_data=False).graph
    (branch,) = (node for node in graph.node if node.op_type == "If")
    inside = {node.name for node in branch.attribute[0].g.node} | {node.name for node in branch.attribute[1].g.node}
    assert sum(name.startswith("/sasa/lane/") for name in inside) > 50
    assert not [node.name for node in graph.node if node.name.startswith("/sasa/lane/") and "state" in node.name]
