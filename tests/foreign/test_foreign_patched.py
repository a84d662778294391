"""A patched graph of somebody else's: it refuses or answers as the original, however it is fed, and says so itself."""

import json
import shutil
from pathlib import Path
from typing import Any

import foreign_graphs
import numpy as np
import pytest
from foreign_runner import Decoder as Runner
from foreign_runner import GraphOracle, padded
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

import sasa_export
from sasa_export.errors import OpenError
from sasa_export.graph_original import GraphOriginal
from sasa_export.onnx.opened import open_graphs
from sasa_export.onnx.run import Model
from sasa_export.prompts import builtin
from sasa_export.prompts.prompt import encoded
from sasa_export.verify import verify_directory

PROMPTS = [prompt for prompt in builtin() if prompt.image is None and prompt.setting == "alone"][::200][:12]
pytestmark = pytest.mark.xdist_group("foreign")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> GraphOriginal:
    return GraphOriginal(str(foreign_graphs.write(tmp_path_factory.mktemp("foreign"))))


@pytest.fixture(scope="module")
def probe(decoder: GraphOriginal) -> dict[str, Any]:
    return foreign_graphs.probe_amid(decoder, PROMPTS)


@pytest.fixture(scope="module")
def patched(decoder: GraphOriginal, probe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("patched")
    source, settings = decoder.source.directory, {"threshold": 0.5, "refusal": "I will not help."}
    return sasa_export.patch(
        foreign_graphs.options(source, folder, probe["weight"], probe["bias"], **settings)
    ).directory


@pytest.fixture(scope="module")
def guarded(patched: Path) -> Model:
    return Model(patched)


@pytest.fixture(scope="module")
def original(decoder: GraphOriginal) -> Model:
    return Model(decoder.source.directory, told={"graphs": decoder.graphs.files})


def test_verdicts_are_those_of_two_passes(decoder: GraphOriginal, guarded: Model, probe: dict[str, Any]) -> None:
    found = np.array([guarded.judge(encoded(decoder.processor, prompt)) for prompt in PROMPTS])
    np.testing.assert_allclose(found, probe["expected"], atol=1e-4)
    assert 0 < (found >= 0.5).sum() < len(found), "both verdicts must have been seen"


@pytest.mark.parametrize("reach", [4, 50])
def test_a_lane_over_the_last_tokens(decoder: GraphOriginal, probe: dict[str, Any], reach: int, tmp_path: Path) -> None:
    """P(unsafe) is that of two passes, the second on these tokens alone at their own positions; whole, in pieces, and
    in batches with pads on either side, in which some rows have fewer."""
    source, weight, bias = decoder.source.directory, probe["weight"], probe["bias"]
    place = tmp_path / str(reach)  # of its own, since sessions are kept by their paths
    place.mkdir()
    options = foreign_graphs.options(source, place, weight, bias, refusal="No.", lane_tokens=reach)
    patched, oracle = sasa_export.patch(options).directory, GraphOracle(source, (1, 2))
    rows = [encoded(decoder.processor, prompt)["input_ids"][0].tolist() for prompt in PROMPTS]
    assert min(map(len, rows)) < 50 < max(map(len, rows))
    ends = np.array([oracle.end(ids, (1, 2), reach)[0] for ids in rows])  # (prompts, hidden)
    expected = 1 / (1 + np.exp(-(ends @ weight + bias)))  # (prompts,)
    assert np.abs(expected - probe["expected"]).max() > 1e-2
    for side in ("left", "right"):
        asked = started(patched, len(rows))
        asked.call(*padded(rows, side, 0))
        np.testing.assert_allclose(asked.probability, expected, atol=1e-4)
    guarded = Model(patched)
    for prompt, wanted in zip(PROMPTS, expected, strict=True):
        inputs = encoded(decoder.processor, prompt)
        count = inputs["input_ids"].shape[1]
        for cuts in ([], [count // 2, count - 1], range(1, count)):
            assert guarded.judge(inputs, list(cuts)) == pytest.approx(wanted, abs=1e-4)


def test_answers_are_the_refusal_or_the_originals(decoder: GraphOriginal, guarded: Model, original: Model) -> None:
    sasa = guarded.config["sasa"]
    for prompt in PROMPTS:
        inputs = encoded(decoder.processor, prompt)
        score, first, tokens = guarded.answer(inputs, 20)
        _, wanted, answer = original.answer(inputs, 20)
        if score < sasa["threshold"]:
            assert np.array_equal(first, wanted) and tokens == answer
        else:
            assert tokens == sasa["refusal_token_ids"][:20]


def test_a_verdict_does_not_depend_on_how_a_prompt_is_fed(decoder: GraphOriginal, guarded: Model) -> None:
    draw = np.random.default_rng(2)
    for prompt in PROMPTS:
        inputs = encoded(decoder.processor, prompt)
        count = inputs["input_ids"].shape[1]
        whole = guarded.judge(inputs)
        for cuts in (range(1, count), sorted(draw.choice(np.arange(1, count), 3, replace=False)), [count - 1]):
            assert guarded.judge(inputs, list(cuts)) == pytest.approx(whole, abs=1e-5)


def started(directory: Path, rows: int = 1) -> Runner:
    asked = Runner(directory)
    asked.start(rows)
    return asked


def of_the_ledger(asked: Runner) -> list[str]:
    """The names of the cache's layers behind those of the blocks."""
    return [name for name in asked.cache if int(name.split(".")[1]) >= foreign_graphs.BLOCKS]


def test_batches_with_pads_on_the_left(decoder: GraphOriginal, patched: Path, probe: dict[str, Any]) -> None:
    """And a second turn on the same cache: the whole conversation is judged again."""
    rows = [encoded(decoder.processor, prompt)["input_ids"][0].tolist() for prompt in PROMPTS]
    ids, mask = padded(rows, "left", 0)
    turn = np.tile(rows[0], (len(rows), 1))
    asked, whole = started(patched, len(rows)), started(patched, len(rows))
    asked.call(ids, mask)
    np.testing.assert_allclose(asked.probability, probe["expected"], atol=1e-4)
    asked.call(turn)
    whole.call(np.concatenate([ids, turn], 1), np.concatenate([mask, np.ones_like(turn)], 1))
    np.testing.assert_allclose(asked.probability, whole.probability, atol=1e-5)


def test_buffers_longer_than_what_they_hold_come_back_as_long(decoder: GraphOriginal, patched: Path) -> None:
    """As onnxruntime-genai shares them; the decoder's own cache here grows, so that only the ledger's are long."""
    ids = encoded(decoder.processor, PROMPTS[0])["input_ids"]
    asked, whole = started(patched), started(patched)
    long = np.full((1, foreign_graphs.HEADS, 60, foreign_graphs.SIZE), 7.0, np.float32)
    asked.cache |= dict.fromkeys(of_the_ledger(asked), long)
    for piece in (ids[:, :-4], ids[:, -4:]):
        asked.call(piece)
        assert asked.cache[of_the_ledger(asked)[0]].shape[2] == 60
    assert (asked.cache[of_the_ledger(asked)[0]][:, :, ids.shape[1] :] == 7.0).all()
    whole.call(ids)
    np.testing.assert_allclose(asked.probability, whole.probability, atol=1e-5)


def test_a_cache_without_the_ledger_is_an_error(decoder: GraphOriginal, patched: Path) -> None:
    ids, asked = encoded(decoder.processor, PROMPTS[0])["input_ids"], started(patched)
    asked.call(ids)
    for name in of_the_ledger(asked):
        asked.cache[name] = asked.cache[name][:, :, :0]
    with pytest.raises((Fail, InvalidArgument, RuntimeException)):
        asked.call(ids)


def test_the_directory_says_what_it_is(patched: Path, decoder: GraphOriginal) -> None:
    source, config = decoder.source.directory, json.loads((patched / "config.json").read_text())
    assert config["num_hidden_layers"] > foreign_graphs.BLOCKS
    assert (patched / "model.onnx_data").read_bytes() == (source / "model.onnx_data").read_bytes()
    assert (patched / "model.onnx").stat().st_size < 600_000
    assert all(check.passed for check in verify_directory(patched))
    with pytest.raises(OpenError, match="a patched model already"):
        open_graphs(str(patched))


def test_a_changed_graph_fails_its_verification(patched: Path, tmp_path: Path) -> None:
    shutil.copytree(patched, tmp_path / "copy")
    cases = tmp_path / "copy" / "sasa-verify" / "cases.json"
    said = json.loads(cases.read_text())
    said["cases"][0]["unsafe_probability"] += 0.1
    cases.write_text(json.dumps(said))
    assert not all(check.passed for check in verify_directory(tmp_path / "copy"))


def test_the_lane_lies_in_a_branch(patched: Path) -> None:
    """A token's call enters none of it."""
    import onnx

    graph = onnx.load(patched / "model.onnx", load_external_data=False).graph
    (branch,) = (node for node in graph.node if node.op_type == "If")
    inside = {node.name for node in branch.attribute[0].g.node} | {node.name for node in branch.attribute[1].g.node}
    assert sum(name.startswith("/sasa/lane/") for name in inside) > 50
    assert not [node.name for node in graph.node if node.name.startswith("/sasa/lane/") and "state" in node.name]
