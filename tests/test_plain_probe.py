"""`--projection none`: the probe reads the main lane's end, as the stock model's logits say; no second lane runs."""

import copy
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import oracle
import pytest
import tiny
import torch
from conftest import Guard
from onnx_runner import Runner
from safetensors.torch import save_file
from test_evaluate import write_set
from test_every_token import continued, stepwise
from test_feeding import chunkings, feed, last_picture_token
from test_onnx_parity import follow
from test_parity import batch, counted, differs
from torch import Tensor
from transformers import AutoModelForImageTextToText

import sasa_export
from sasa_export.research.evaluate import EvaluateOptions, evaluate
from sasa_export.runtime.settings import check_settings

FAMILIES = [pytest.param(family, marks=pytest.mark.xdist_group(family)) for family in ("llava", "qwen2_5_vl", "gemma3")]
every_family = pytest.mark.parametrize("family", FAMILIES)
TOLERANCE = 1e-5
STEPS = 8

Guards = Callable[..., Guard]


@dataclass(frozen=True)
class PlainGuard(Guard):
    """A tiny model whose probe reads the main lane."""

    def expected(self, inputs: Any) -> Tensor:
        """P(unsafe) of each row (batch,), by a plain pass of the stock model."""
        return oracle.unsafe_probability(oracle.plain_logits(self.stock, inputs), self.weight, self.bias)


@pytest.fixture(scope="module")
def plain(guard: Guards, tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Guards:
    """`plain(family, **options)`: patched without projection, with the probe of `guard(family)`."""
    made: dict[str, PlainGuard] = {}

    def get(family: str, **options: Any) -> PlainGuard:
        key = f"{family} {options}"
        if key not in made:
            other, out = guard(family), tmp_path_factory.mktemp("plain")
            probe = {"sasa.probe.weight": oracle.folded(other.stock, other.weight)}
            save_file(probe | {"sasa.probe.bias": torch.tensor(other.bias)}, out / "probe.safetensors")
            given: dict[str, Any] = {"refusal": "I will not help.", "verify": "files", "projection": "none", **options}
            sasa_export.patch(
                sasa_export.Options(
                    model=str(tiny_model(family)), out=out / "patched", probe=out / "probe.safetensors", **given
                )
            )
            model = AutoModelForImageTextToText.from_pretrained(out / "patched", trust_remote_code=True).eval()
            kept = (other.stock, other.processor, -1, -1, other.weight, other.bias)
            made[key] = PlainGuard(family, out / "patched", model, *kept)
        return made[key]

    return get


@every_family
@torch.no_grad()
def test_the_verdict_is_the_main_lanes(plain: Guards, family: str) -> None:
    """P(unsafe), allowed logits to the bit, and the answers; each block runs once."""
    guarded = plain(family)
    inputs = batch(guarded)
    expected = guarded.stock(**inputs).logits  # (batch, tokens, vocabulary)
    paths = [node["module"] for node in guarded.model.config.sasa["graph"] if node["op"] == "block"]
    with guarded.halved(inputs) as refused:
        with counted(guarded.model, paths) as calls:
            found = guarded.model(**inputs)
        answers = guarded.model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
        same = guarded.stock.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
    assert set(calls.values()) == {1} and len(calls) == tiny.LAYERS
    assert differs(found.unsafe_probability, guarded.expected(inputs)) <= TOLERANCE
    assert refused.any() and not refused.all()
    assert torch.equal(found.logits[~refused], expected[~refused])
    start = inputs["input_ids"].shape[1]
    assert torch.equal(answers[~refused], same[~refused])
    said = answers[refused][:, start:]
    assert said.tolist() == [guarded.refusal[: said.shape[1]]] * len(said)


@every_family
@pytest.mark.parametrize("gate", ["prompt", "every-token"])
@torch.no_grad()
def test_any_feeding(plain: Guards, family: str, gate: str) -> None:
    guarded = plain(family, gate=gate)
    inputs = batch(guarded, count=3, seed=4)
    expected = guarded.expected(inputs)  # (batch,)
    with guarded.at(2.0):  # nothing is refused on the way
        for ends in chunkings(inputs["input_ids"].shape[1], last_picture_token(guarded, inputs), seed=1)[:8]:
            found = feed(guarded, inputs, ends).unsafe_probability  # (batch,)
            torch.testing.assert_close(found, expected, rtol=0.0, atol=TOLERANCE)


@pytest.mark.xdist_group("llava")
@torch.no_grad()
def test_each_token_of_an_answer(plain: Guards) -> None:
    guarded = plain("llava", gate="every-token")
    inputs = batch(guarded, images=False, count=3, seed=4)
    said = guarded.stock.generate(**inputs, max_new_tokens=STEPS)
    found = stepwise(guarded, inputs, said)  # (batch, steps)
    for step in range(found.shape[1]):
        end = inputs["input_ids"].shape[1] + step
        expected = guarded.expected(continued(inputs, said[:, inputs["input_ids"].shape[1] : end]))
        torch.testing.assert_close(found[:, step], expected, rtol=0.0, atol=TOLERANCE)


@pytest.mark.xdist_group("llava")
def test_a_verdict_on_a_token_of_an_earlier_call(plain: Guards) -> None:
    """A conversation cropped back behind its prompt is judged by the state that the ledger kept of it."""
    guarded = plain("llava")
    inputs = batch(guarded, images=False, count=1, seed=5)
    ids = torch.cat([inputs["input_ids"], torch.full((1, 1), guarded.refusal[-1])], dim=1)  # (1, tokens + 1)
    start = inputs["input_ids"].shape[1]
    with torch.no_grad():
        first = guarded.model(input_ids=torch.cat([ids, inputs["input_ids"]], dim=1), use_cache=True)
        cache = first.past_key_values
        cache.crop(start - cache.get_seq_length())
        found = guarded.model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    torch.testing.assert_close(found.unsafe_probability, guarded.expected(inputs), rtol=0.0, atol=TOLERANCE)


@pytest.mark.skipif(not os.environ.get("SASA_SLOW"), reason="an export of its own takes long: set SASA_SLOW=1")
@pytest.mark.xdist_group("onnx-llava")
def test_the_graph(plain: Guards, exported: Callable[..., Path]) -> None:
    """ONNX says what torch says, and runs no block twice."""
    import onnx_ir as ir

    first = plain("llava")
    prompts = tiny.prompts(first.processor, images=True, count=6, seed=1, padding_side="left")
    scores = first.expected(prompts).sort().values  # (batch,)
    guarded = plain("llava", threshold=float(scores[2:4].mean()))
    directory = exported(guarded.directory)
    states, differences = follow(guarded, Runner(directory), prompts, len(guarded.refusal) + 2)
    assert max(differences) < 1e-4
    assert set(states) == {0.0, float(len(guarded.refusal))}
    graph = ir.load(directory / "onnx/decoder_model_merged.onnx").graph
    assert sum(node.op_type == "Attention" for node in graph.all_nodes()) == tiny.LAYERS


def edited(sasa: dict[str, Any], change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    settings = copy.deepcopy(sasa)
    change(settings)
    return settings


@pytest.mark.xdist_group("llava")
def test_settings_and_graph_must_agree(plain: Guards, guard: Guards) -> None:
    """No mixture of a graph with and of one without projection loads."""
    own, other = plain("llava").model.config.sasa, guard("llava").model.config.sasa
    assert check_settings(own) is own
    tap = next(node for node in own["graph"] if node["op"] == "tap")
    blocks = [node["module"] for node in own["graph"] if node["op"] == "block"]

    def without(operation: str) -> Callable[[dict[str, Any]], Any]:
        return lambda sasa: sasa.update(graph=[node for node in sasa["graph"] if node["op"] != operation])

    def of(operation: str, **values: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda sasa: next(node for node in sasa["graph"] if node["op"] == operation).update(values)

    damaged = {
        "layers of a graph that has none": edited(own, lambda sasa: sasa.update(safety_layer=2, semantic_layer=4)),
        "one layer alone": edited(own, lambda sasa: sasa.update(semantic_layer=4)),
        "no layers of a graph that has some": edited(
            other, lambda sasa: sasa.update(safety_layer=None, semantic_layer=None)
        ),
        "a tap of another block": edited(own, of("tap", module=blocks[0])),
        "no tap": edited(own, without("tap")),
        "no blocks": edited(own, without("block")),
        "no gate": edited(own, without("gate")),
        "a norm of something else": edited(own, of("lane_norm", inputs=["layers.0"])),
        "a probe of something else": edited(own, of("probe", inputs=[tap["name"]])),
        "a gate of something else": edited(own, of("gate", inputs=["head", "sasa.lane.norm"])),
    }
    for name, settings in damaged.items():
        with pytest.raises(ValueError, match=r"config\.sasa"):
            check_settings(settings)
            pytest.fail(name)


@pytest.mark.parametrize("layer", ["safety_layer", "semantic_layer"])
def test_it_takes_no_layers(layer: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {layer: 1}
    options = sasa_export.Options(model="x", out=tmp_path / "out", projection="none", **given)
    with pytest.raises(sasa_export.SasaExportError, match="--projection none has no safety and no semantic layer"):
        options.check()


@pytest.mark.xdist_group("llava")
def test_calibrated_and_evaluated(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """From calibration to report: figures of the plain probe alone, the card says so, and projection is the control."""
    sets = [write_set(tmp_path, "evaluation", 1, 12), write_set(tmp_path, "calibration", 2, 20)]
    patched = sasa_export.patch(
        sasa_export.Options(
            model=str(tiny_model("llava")), out=tmp_path / "patched", calibration=(str(sets[1]),), projection="none",
            max_false_positive_rate=0.2, batch_size=8, verify="files",
        )
    )  # fmt: skip
    assert patched.calibration is not None
    assert {figure.feature for figure in patched.calibration.figures} == {"plain"}
    card = (tmp_path / "patched/README.md").read_text()
    assert "No projection, so no layers to choose" in card and "with projection |" not in card
    assert f"Over the prompt {tiny.LAYERS} blocks run, as in the original" in card
    found = evaluate(
        EvaluateOptions(
            model=tmp_path / "patched", out=tmp_path / "report", data=(str(sets[0]),), timing=0, max_new_tokens=4,
            batch_size=8,
        )
    )  # fmt: skip
    assert found is not None
    assert [arm.key for arm in found.arms] == ["plain", "patched", "with", "words"]
    assert found.utility.identical is not None and found.utility.identical.count == found.utility.identical.total > 0
    report = (tmp_path / "report/report.md").read_text()
    assert "patched model (probe without projection)" in report and "there is no second lane" in report
    assert json.loads((tmp_path / "report/evaluate.json").read_text())["subject"]["safety_layer"] is None
