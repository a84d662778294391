"""`--further-pair`: several second lanes, one a pair of layers, and one probe on all of their ends."""

import copy
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import tiny
import torch
from click.testing import CliRunner
from conftest import Guard
from onnx_runner import Runner, image_token, positions
from test_evaluate import write_set
from test_feeding import chunkings, feed, last_picture_token

import sasa_export
from sasa_export.calibrate.probe import fit, folded, in_metric, in_parts, probability
from sasa_export.cli import main
from sasa_export.evaluate import EvaluateOptions, evaluate
from sasa_export.runtime.settings import check_settings

Guards = Callable[..., Guard]

FAMILIES = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ("llava", "gemma3", "qwen2_5_vl")]
every_family = pytest.mark.parametrize("family", FAMILIES)
TOLERANCE = 1e-5
FURTHER = ["1:3", "3:5"]  # besides 2 and 4, of six blocks


def batch(guarded: Guard, *, images: bool = True, count: int = 4) -> dict[str, Any]:
    return dict(tiny.prompts(guarded.processor, images=images, count=count, seed=4, padding_side="left"))


@every_family
@torch.no_grad()
def test_the_verdict_is_the_oracles(guard: Guards, family: str) -> None:
    """However the prompt is fed; refused rows spell the refusal, and allowed ones are the stock model's."""
    guarded = guard(family, further_pair=FURTHER)
    inputs = batch(guarded)
    expected = guarded.expected(inputs)  # (batch,)
    with guarded.halved(inputs) as refused:
        for ends in chunkings(inputs["input_ids"].shape[1], last_picture_token(guarded, inputs), seed=1)[:5]:
            found = feed(guarded, inputs, ends).unsafe_probability  # (batch,)
            torch.testing.assert_close(found, expected, rtol=0.0, atol=TOLERANCE)
        whole = guarded.model(**inputs)
        assert torch.equal(whole.logits[~refused], guarded.stock(**inputs).logits[~refused])
        said, plain = (
            model.generate(**inputs, max_new_tokens=12)[:, inputs["input_ids"].shape[1] :]
            for model in (guarded.model, guarded.stock)
        )  # (batch, tokens)
    assert refused.any() and not refused.all()
    assert all(row.tolist() == guarded.refusal[: len(row)] for row in said[refused])
    width = min(said.shape[1], plain.shape[1])
    assert torch.equal(said[~refused, :width], plain[~refused, :width])


@pytest.mark.xdist_group("llava")
@pytest.mark.parametrize(
    "options", [{"probe_block": 3}, {"probe_positions": 3}, {"probe_block": 4, "probe_positions": 2}]
)
@torch.no_grad()
def test_with_other_settings_of_the_probe(guard: Guards, options: dict[str, int]) -> None:
    guarded = guard("llava", further_pair=FURTHER, **options)
    inputs = batch(guarded)
    expected = guarded.expected(inputs)  # (batch,)
    assert (expected - guard("llava", further_pair=FURTHER).expected(inputs)).abs().max() > 1e-3
    for ends in ([inputs["input_ids"].shape[1]], chunkings(inputs["input_ids"].shape[1], 40, seed=1)[3]):
        found = feed(guarded, inputs, ends).unsafe_probability  # (batch,)
        torch.testing.assert_close(found, expected, rtol=0.0, atol=TOLERANCE)


@pytest.mark.xdist_group("llava")
@pytest.mark.parametrize("cache", ["dynamic", "static", "beams"])
@torch.no_grad()
def test_caches_and_beams(guard: Guards, cache: str) -> None:
    """The ledger is as many layers longer as two more states need, in every kind of cache."""
    guarded = guard("llava", further_pair=FURTHER)
    inputs = batch(guarded)
    ways: dict[str, dict[str, Any]] = {"static": {"cache_implementation": "static"}, "beams": {"num_beams": 2}}
    with guarded.halved(inputs) as refused:
        said, plain = (
            model.generate(**inputs, max_new_tokens=8, **ways.get(cache, {}))
            for model in (guarded.model, guarded.stock)
        )
    start = inputs["input_ids"].shape[1]
    assert all(row.tolist()[start:] == guarded.refusal[: len(row) - start] for row in said[refused])
    width = min(said.shape[1], plain.shape[1])
    assert torch.equal(said[~refused, :width], plain[~refused, :width])


@pytest.mark.xdist_group("onnx-llava")
@torch.no_grad()
def test_in_onnx(guard: Guards, exported: Callable[..., Path]) -> None:
    """P(unsafe), over the prompt and over a second turn on the cache; each lane's blocks stand in the graph once."""
    guarded = guard("llava", further_pair=FURTHER, probe_positions=2)
    directory = exported(guarded.directory)
    runner, inputs = Runner(directory), batch(guarded)
    ids, _ = positions(guarded, inputs)
    runner.prompt({name: value.numpy() for name, value in inputs.items()}, image_token(guarded), ids.numpy())
    assert runner.probability is not None
    np.testing.assert_allclose(runner.probability, guarded.expected(inputs).numpy(), atol=1e-4, rtol=0)
    graph = ir.load(directory / "onnx" / "decoder_model_merged.onnx").graph
    counts = Counter(node.op_type for node in graph.all_nodes())
    assert counts["Attention"] == tiny.LAYERS + 3 + 4 + 2


def test_settings_and_card(guard: Guards) -> None:
    guarded = guard("llava", further_pair=FURTHER)
    card = (guarded.directory / "README.md").read_text()
    assert "(block 4), that of block 1 onto that of 3, that of block 3 onto that of 5, the blocks behind each" in card
    assert "further pair 1 and 3, further pair 3 and 5." in card
    assert "6 + 9 blocks run, 2.50 times the original's" in card and "all lanes' ends" in card
    sasa = guarded.model.config.sasa
    assert check_settings(sasa)

    def of(name: str, **values: Any) -> dict[str, Any]:
        changed = copy.deepcopy(sasa)
        next(node for node in changed["graph"] if node["name"] == name).update(values)
        return changed

    damaged = [
        {**sasa, "further_pairs": []},
        {**sasa, "further_pairs": [[1, 3]]},
        {**sasa, "further_pairs": [[3, 5], [1, 3]]},
        {**sasa, "further_pairs": [[1, 3], [3, 6]]},
        {**sasa, "gate": "every-token"},
        of("sasa.join", inputs=["sasa.lane.norm", "sasa.lane.norm", "sasa.lane.norm"]),
        of("sasa.join", inputs=["sasa.lane.norm", "sasa.pair2.lane.norm"]),
        of("sasa.probe", inputs=["sasa.lane.norm"]),
        of("sasa.pair2.projection", inputs=["sasa.safety", "sasa.semantic"]),
        of("sasa.pair3.projection", epsilon=1.0),
        of("sasa.pair2.lane.norm", inputs=["sasa.lane.layers.5"]),
        {**sasa, "graph": [node for node in sasa["graph"] if not node["name"].startswith("sasa.pair3")]},
    ]
    for number, settings in enumerate(damaged):
        with pytest.raises(ValueError, match=r"config\.sasa"):
            check_settings(settings)
            pytest.fail(f"number {number} was taken")


def test_each_lane_has_a_probe_of_its_own() -> None:
    """The log odds of the joint probe are the mean of those that each lane's own probe gives."""
    draw = np.random.default_rng(3)
    features, labels = draw.normal(size=(40, 3 * 4)), np.arange(40) % 2
    root = np.triu(draw.normal(size=(4, 4)))
    measured = in_metric(features.astype(np.float32), root)
    weight, bias = in_parts(fit, 3)(measured, labels, 0.1)
    alone = [fit(features[:, 4 * part : 4 * part + 4] @ root.T, labels, 0.1) for part in range(3)]
    odds = np.mean([features[:, 4 * part : 4 * part + 4] @ root.T @ w + b for part, (w, b) in enumerate(alone)], axis=0)
    np.testing.assert_allclose(measured @ weight + bias, odds, atol=1e-5)
    np.testing.assert_allclose(features @ folded(weight, root) + bias, odds, atol=1e-5)
    assert probability(measured, weight, bias).shape == (40,)


@pytest.mark.xdist_group("llava")
def test_calibrated_verified_and_evaluated(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """From calibration, verified in a fresh process, to the report, whose arm with projection has the same lanes."""
    sets = [write_set(tmp_path, "evaluation", 1, 12), write_set(tmp_path, "calibration", 2, 20)]
    patched = sasa_export.patch(
        sasa_export.Options(
            model=str(tiny_model("llava")), out=tmp_path / "patched", calibration=(str(sets[1]),), safety_layer=2,
            semantic_layer=4, further_pair=("1:3",), max_false_positive_rate=0.2, batch_size=8,
        )
    )  # fmt: skip
    assert patched.calibration is not None and patched.probe.weight.shape == (2 * tiny.HIDDEN,)
    found = evaluate(
        EvaluateOptions(
            model=tmp_path / "patched", out=tmp_path / "report", data=(str(sets[0]),), timing=0, max_new_tokens=4,
            batch_size=8, variants=True,
        )
    )  # fmt: skip
    assert found is not None
    subject = json.loads((tmp_path / "report/evaluate.json").read_text())["subject"]
    assert subject["further_pairs"] == [[1, 3]] and subject["again"] == 3 + 4
    with_projection = found.fitted["with"]["auc_on_the_calibration_prompts_cross_validated"]
    own = next(figure for figure in patched.calibration.figures if figure.channel == "all")
    assert own.feature == "projected" and abs(own.auc - with_projection) < 0.01
    result = CliRunner().invoke(
        main,
        ["evaluate", "--model", str(tmp_path / "patched"), "--data", str(sets[0]), "--depth-curve",
         "--out", str(tmp_path / "other")],
    )  # fmt: skip
    assert result.exit_code == 1 and "--depth-curve draws one second lane" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--further-pair", "3"], "a pair is SAFETY:SEMANTIC in block numbers"),
        (["--further-pair", "3:-4"], "a pair is SAFETY:SEMANTIC in block numbers"),
        (["--further-pair", "4:3"], "do not fit a decoder of 6 blocks"),
        (["--further-pair", "3:6"], "do not fit a decoder of 6 blocks"),
        (["--further-pair", "3:5", "--further-pair", "3:5"], "names a pair of layers that is there already"),
        (["--further-pair", "2:4", "--safety-layer", "2", "--semantic-layer", "4"], "that is there already"),
        (["--further-pair", "4:5", "--probe-block", "3"], "--probe-block is 3; it must be from the safety layer, 4"),
        (["--further-pair", "3:5", "--projection", "none"], "has no second lane"),
        (["--further-pair", "3:5", "--gate", "every-token"], "one second lane alone runs beside an answer"),
        (["--further-pair", "3:5", "--safety-layer", "auto"], "Give both layers"),
    ],
)
def test_what_it_does_not_go_with(words: list[str], said: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--model", str(tiny_model("llava")), "--out", str(tmp_path / "out"), *words])
    assert result.exit_code == 1 and said in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists() and isinstance(result.exception, SystemExit)
