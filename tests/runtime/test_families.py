"""Every family as one short row of tests: verdict, tokens, pieces, turns, reloading. The widest ones have whole files.

`make families` runs them all and writes docs/results/families.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import labelled
import pytest
import tiny
import torch
import transformers
from cli_steps import write_probe
from conftest import Guard, load
from feeding import chunkings, feed, last_picture_token

from sasa_export import Options, patch
from sasa_export.errors import EmitError, LocateError, OpenError, RewriteError, TraceError
from sasa_export.graph.trace import trace_source
from sasa_export.layers.pairs import possible
from sasa_export.models import open_source
from sasa_export.models.family import family_of
from sasa_export.models.load import load_processor

Guards = Callable[..., Guard]

TOLERANCE = 1e-5
TOKENS = 20

# Beyond the oracle, the fast run tries one family of each kind of mask, position and state.
FAST = ("llava", "gemma3", "qwen2_5_vl", "lfm2_vl")
every_family = pytest.mark.parametrize("family", tiny.MAKERS)
each_family = pytest.mark.parametrize(
    "family", [pytest.param(family, marks=[pytest.mark.slow] * (family not in FAST)) for family in tiny.MAKERS]
)


@pytest.fixture(autouse=True)
def _runs(request: pytest.FixtureRequest) -> None:
    """Skip, loudly, what the stock model cannot do either on this transformers."""
    found = getattr(getattr(request.node, "callspec", None), "params", {}).get("family")
    if reason := tiny.BROKEN.get((str(found), transformers.__version__)):
        pytest.skip(f"transformers {transformers.__version__} fails on {found}: {reason}")


@pytest.fixture
def guarded(guard: Guards, family: str) -> Guard:
    return guard(family) if family in tiny.FAMILIES else guard(family, tiny.SAFETY, tiny.SEMANTIC)


@every_family
@torch.no_grad()
def test_oracle(guarded: Guard, family: str) -> None:
    """P(unsafe) is the oracle's; allowed rows keep their logits to the bit; refused rows say the refusal next, and the
    logits of their prompt say nothing but the refusal either."""
    for images, padding_side in [(True, "left"), (True, "right"), (False, "left"), (False, "right")]:
        inputs = guarded.batch(images=images, padding_side=padding_side)
        with guarded.halved(inputs) as refused:
            found = guarded.model(**inputs)
        stock = guarded.stock(**inputs).logits
        assert found.unsafe_probability.dtype == torch.float32
        assert (found.unsafe_probability - guarded.expected(inputs)).abs().max() <= TOLERANCE
        assert torch.equal(found.logits[~refused], stock[~refused])
        assert (found.logits[refused].argmax(dim=-1) == guarded.refusal[0]).all()


@each_family
@torch.no_grad()
def test_tokens(guarded: Guard, family: str) -> None:
    """Twenty greedy tokens: allowed rows those of the stock model, refused rows the refusal."""
    for images, padding_side in [(True, "left"), (True, "right"), (False, "left")]:
        inputs = guarded.batch(images=images, padding_side=padding_side)
        prompt = inputs["input_ids"].shape[1]
        expected = guarded.stock.generate(**inputs, max_new_tokens=TOKENS)[:, prompt:]  # (batch, up to TOKENS)
        with guarded.halved(inputs) as refused:
            found = guarded.model.generate(**inputs, max_new_tokens=TOKENS)[:, prompt:]
        guarded.check_answers(found, expected, refused)


WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 2},
    "static cache": {"cache_implementation": "static"},
    "prefill in chunks": {"prefill_chunk_size": 5},
    "no cache": {"use_cache": False},
}


@every_family
@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_ways(guarded: Guard, family: str, way: str) -> None:
    """However `generate` runs, allowed rows are answered as by the stock model, and refused rows refused."""
    images = way in ("beams", "no cache")
    inputs = guarded.batch(images=images)
    options = {"max_new_tokens": 6, "do_sample": False, **WAYS[way]}
    prompt = inputs["input_ids"].shape[1]
    try:
        expected = guarded.stock.generate(**inputs, **options)[:, prompt:]  # (batch, up to 6)
    except Exception as error:
        pytest.skip(f"the stock model cannot: {error}")
    with guarded.halved(inputs) as refused:
        found = guarded.model.generate(**inputs, **options)[:, prompt:]
    guarded.check_answers(found, expected, refused)


@each_family
@torch.no_grad()
def test_pieces(guarded: Guard, family: str) -> None:
    """A prompt in pieces is judged as the whole one, however it is cut."""
    inputs = guarded.batch(count=3, seed=4)
    expected = guarded.expected(inputs)  # (batch,)
    first, tolerance = last_picture_token(guarded, inputs), TOLERANCE
    if family in tiny.RECURRENT:  # in the stock model too, such a state rounds, and padding fed alone counts
        first, tolerance = max(first, int((inputs["attention_mask"] == 0).sum(-1).max()) + 1), 10 * TOLERANCE
    with guarded.halved(inputs) as refused:
        for ends in chunkings(inputs["input_ids"].shape[1], first, 12 if family == "llava" else 4):
            found = feed(guarded, inputs, ends)
            torch.testing.assert_close(found.unsafe_probability, expected, rtol=0.0, atol=tolerance)
            assert torch.equal(found.logits[:, -1].argmax(-1) == guarded.refusal[0], refused), ends


@each_family
@torch.no_grad()
def test_second_turn(guarded: Guard, family: str) -> None:
    """A second question on the kept cache is judged with all that came before it; an answer's token never is."""
    inputs = guarded.batch(count=1)
    answer = torch.tensor([[70, 71, guarded.refusal[-1]]])  # (1, 3), the end of sequence last
    question = guarded.batch(images=False, count=1, seed=9)["input_ids"]  # (1, tokens)
    ids = torch.cat([inputs["input_ids"], answer, question], dim=1)  # (1, context)
    whole = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids"):
        if name in inputs:
            whole[name] = torch.nn.functional.pad(inputs[name], (0, ids.shape[1] - inputs[name].shape[1]))
    start = inputs["input_ids"].shape[1]
    with guarded.at(0.999):
        during = feed(guarded, whole, [start, start + 1, start + 2])
        after = feed(guarded, whole, [start, start + 1, start + 2, start + 3, ids.shape[1]])
    assert during.unsafe_probability.isnan().all()
    torch.testing.assert_close(after.unsafe_probability, guarded.expected(whole), rtol=0.0, atol=TOLERANCE)


@each_family
@torch.no_grad()
def test_reload(guarded: Guard, family: str, tmp_path: Path) -> None:
    """Saved and loaded again, it proves its gate, and judges and answers as before."""
    guarded.model.save_pretrained(tmp_path)
    again = load(tmp_path, sasa={"prove": True})
    inputs = guarded.batch()
    found, before = again(**inputs), guarded.model(**inputs)
    assert torch.equal(found.unsafe_probability, before.unsafe_probability)
    assert torch.equal(found.logits, before.logits)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["internvl", "mistral3", "qwen3_vl_moe", "llama4"])
def test_export(tiny_model: Callable[..., Path], family: str, tmp_path: Path) -> None:
    """Calibrated, written, and verified against the original in a fresh process."""
    calibration = labelled.write_set(tmp_path, "calibration", 1, 30)
    options = Options(
        str(tiny_model(family)), tmp_path / "out", calibration=(str(calibration),), max_false_positive_rate=0.2,
        safety_layer=tiny.SAFETY, semantic_layer=tiny.SEMANTIC, batch_size=8, refusal="I will not help.",
    )  # fmt: skip
    assert patch(options).calibration is not None


@pytest.mark.parametrize(
    ("family", "form", "said"),
    [
        ("glm4v", "both", "'glm4v' has no ONNX recipe. Supported: gemma3, .* Export it with --format safetensors, or"),
        ("pixtral", "onnx", "'llava' is for a vision tower of type clip_vision_model .* has one of type pixtral"),
        ("granite_vision", "onnx", "'llava_next' is for a vision tower of type clip_vision_model, .* siglip_vision"),
    ],
)
def test_what_has_no_onnx_recipe(
    tiny_model: Callable[..., Path], tmp_path: Path, family: str, form: Any, said: str
) -> None:
    with pytest.raises(EmitError, match=said):
        patch(Options(str(tiny_model(family)), tmp_path / "out", format=form))
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- what a picture adds between blocks


def test_a_safety_layer_in_front_of_what_a_picture_adds(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Nothing is written, also where no weights are loaded, which would show it too."""
    source = open_source(str(tiny_model("qwen3_vl")))
    graph = trace_source(source, load_processor(source))
    assert [node.name for node in graph.of("between")] == ["between.0.1", "between.1.2"]
    assert graph["layers.2"].inputs == ("between.1.2",) and graph.earliest_safety_layer() == 2
    assert possible([(0, 3), (1, 3), (2, 3)], 2) == [(2, 3)]
    with pytest.raises(LocateError, match="the safety layer is 2 at the earliest"):
        possible([(0, 3), (1, 3)], 2)
    probe = write_probe(tmp_path / "probe.safetensors", torch.randn(32))
    for safety in (0, 1):
        options = Options(
            str(source.directory), tmp_path / "out", probe=probe, verify="files",
            safety_layer=safety, semantic_layer=3,
        )  # fmt: skip
        with pytest.raises(RewriteError, match=r"between\.1\.2: .* a later --safety-layer: 2 is the first that can be"):
            patch(options)
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------- what cannot be


def test_blocks_that_are_given_more_than_a_second_lane_has(tmp_path: Path) -> None:
    """As in Gemma 4 E2B and E4B, of the same model type as those that can be guarded."""
    more = {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 400, "num_kv_shared_layers": 2}
    source = open_source(str(tiny.build("gemma4", tmp_path, **more)))
    with pytest.raises(TraceError, match=r"layers\.0 is given Tensor beside.*cannot be guarded"):
        trace_source(source, load_processor(source))


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mllama", "cross-attention blocks"),
        ("gemma3n", "per-layer inputs"),
        ("paligemma", "no chat model"),
        ("janus", "draws pictures"),
        ("phi4_multimodal", "vision-lora"),
    ],
)
def test_a_family_that_cannot_be_guarded_is_refused_by_name(tmp_path: Path, model_type: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    with pytest.raises(OpenError, match=rf"model type '{model_type}' cannot be guarded: .*{reason}"):
        open_source(str(tmp_path))
    with pytest.raises(OpenError) as other:
        family_of("bert")
    assert model_type not in str(other.value)
