"""The whole calibration, and the features of tiny models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import labelled
import numpy as np
import oracle
import pytest
import tiny
import torch
from calibration_samples import prompts_of, samples
from cli_steps import flags, succeeds
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, ProcessorMixin

from sasa_export.errors import CalibrationError
from sasa_export.graph import LayerGraph, Node
from sasa_export.graph.rewrite import LaneSettings, rewrite_lane
from sasa_export.graph.trace import trace
from sasa_export.models.family import family_of
from sasa_export.probe import channels
from sasa_export.probe.calibration import Calibration, calibrate, with_threshold
from sasa_export.probe.features import Features, collect
from sasa_export.probe.fit import probability, threshold_for
from sasa_export.prompts.prompt import Prompt, batches, encode

Stock = Callable[..., tuple[PreTrainedModel, ProcessorMixin]]

# -------------------------------------------------------------------------------------- the whole calibration


class Head(torch.nn.Linear):
    """A model that is nothing but its head."""

    def get_output_embeddings(self) -> Head:
        return self


@pytest.fixture
def calibrated() -> Callable[..., Calibration]:
    """`calibrated(projected, plain, labels, operations, **options)`: a calibration on given features."""

    def run(
        projected: np.ndarray, plain: np.ndarray, labels: np.ndarray, operations: str = "projection", **options: Any
    ) -> Calibration:
        found = Features(projected.astype(np.float32), plain.astype(np.float32))
        graph = LayerGraph(tuple(Node(name, name) for name in ["embed", *operations.split()]))
        channels = "tp" * (len(labels) // 4) + "pt" * (len(labels) // 4)
        torch.manual_seed(0)
        head = Head(5 if "lane_head" in operations else projected.shape[1], 200, bias=False)  # logits are no states
        prompts = prompts_of(labels, channels)
        strength = options.pop("regularization", None)
        fitted = calibrate(head, graph, found, prompts, strength)
        return with_threshold(fitted, prompts, **{"max_false_positive_rate": 0.05, **options})

    return run


@pytest.mark.parametrize("operations", ["projection", "projection lane_head", ""])
def test_a_calibration_of_separable_states(calibrated: Callable[..., Calibration], operations: str) -> None:
    """A lane that ends in the head gives logits, which need no metric; without projection there is no second lane."""
    projected, labels = samples(80, 8, gap=6.0)
    found = calibrated(projected, samples(80, 8, gap=0.0, seed=5)[0], labels, operations)
    by_name = {(figure.feature, figure.part): figure for figure in found.figures}
    features = ("projected", "plain") if operations else ("plain",)
    assert list(by_name) == [(feature, channel) for feature in features for channel in ("all", "text", "picture")]
    overall = by_name[features[0], "all"]
    assert overall.auc > 0.95 and overall.false_positive_rate <= 0.05
    assert not operations or by_name["plain", "all"].auc < 0.75
    assert found.probe.threshold == threshold_for(found.cross_validated, labels, 0.05)
    # The folded probe on the states says what the fitted one says in its own dimensions.
    states = projected.astype(np.float32).astype(np.float64)
    said = probability(states, found.probe.weight.astype(np.float64), found.probe.bias)
    np.testing.assert_allclose(said, found.final, rtol=0, atol=1e-5)
    assert found.probe.weight.shape == (8,) and found.probe.weight.dtype == np.float32
    assert found.final[labels == 1].mean() - found.final[labels == 0].mean() > 0.5


def test_figures_are_of_the_threshold_that_is_given(calibrated: Callable[..., Calibration]) -> None:
    states, labels = samples(200, 8, gap=1.5)
    chosen = calibrated(states, states, labels)
    found = calibrated(states, states, labels, threshold=0.3)
    assert chosen.max_false_positive_rate == 0.05 and found.max_false_positive_rate is None
    assert found.probe.threshold == 0.3 < chosen.probe.threshold
    for figure in found.figures:
        if figure.part == "all":
            assert figure.recall == (found.cross_validated[labels == 1] >= 0.3).mean()
            assert figure.false_positive_rate == (found.cross_validated[labels == 0] >= 0.3).mean() > 0.05


def test_over_refusal_is_limited_in_long_text_alike() -> None:
    """Long text has higher scores than short text, whatever is asked, and a feature that tells it."""
    rng, labels = np.random.default_rng(5), np.arange(2000) % 2
    long = np.arange(2000) % 4 > 1
    prompts = [replace(prompt, prompt="word " * (200 if it else 9)) for prompt, it in
               zip(prompts_of(labels, "t" * 2000), long, strict=True)]  # fmt: skip
    scores = 1 / (1 + np.exp(-(rng.normal(size=2000) + 3.0 * labels + 2.0 * long - 2.0)))  # (prompts,)
    detected = np.stack([np.zeros(2000), long + rng.normal(size=2000) / 50], axis=1)  # (prompts, marks)
    by = channels.offsets(scores, prompts, 0.05)
    assert by[0] == 0.0 and by[1] == pytest.approx(2.0, abs=0.5)
    lower = channels.lowered(scores, detected, by)
    threshold = threshold_for(lower, labels, 0.05)
    for some in (long, ~long):
        assert abs((lower >= threshold)[some & (labels == 0)].mean() - 0.05) < 0.03


def test_over_refusal_is_limited_in_text_and_in_pictures_alike(calibrated: Callable[..., Calibration]) -> None:
    """Pictures have noisier scores than text, and a first feature that tells them apart, as image tokens do."""
    states, labels = samples(800, 8, gap=4.0)
    picture = np.array([channel == "p" for channel in "tp" * 200 + "pt" * 200])
    states[picture] = samples(800, 8, gap=0.5, seed=3)[0][picture]
    states[:, 0] = 10.0 * picture
    found = calibrated(states, states, labels)
    by_part = {figure.part: figure for figure in found.figures if figure.feature == "projected"}
    for channel in ("text", "picture"):
        assert by_part[channel].false_positive_rate <= 0.06
    assert by_part["text"].recall > 0.8
    refused = found.final >= found.probe.threshold
    assert abs(refused[picture & (labels == 0)].mean() - 0.05) < 0.05
    # What is lowered is folded into the probe.
    narrow = states.astype(np.float32).astype(np.float64)
    said = probability(narrow, found.probe.weight.astype(np.float64), found.probe.bias)
    np.testing.assert_allclose(said, found.final, rtol=0, atol=1e-4)


def test_figures_are_of_the_judged_prompts_alone(calibrated: Callable[..., Calibration]) -> None:
    """The threshold is still that of all prompts."""
    states, labels = samples(200, 8, gap=3.0)
    rows = list(range(50, 150))
    whole, held_out = calibrated(states, states, labels), calibrated(states, states, labels, judged=rows)
    assert held_out.probe.threshold == whole.probe.threshold and len(held_out.final) == 200
    overall = held_out.figures[0]
    caught = held_out.cross_validated[rows][labels[rows] == 1] >= held_out.probe.threshold
    assert (overall.part, overall.prompts, overall.recall) == ("all", 100, caught.mean())


def test_the_regularization_is_chosen_or_given(calibrated: Callable[..., Calibration]) -> None:
    states, labels = samples(80, 200, gap=3.0)
    states = 20 * states
    found, given = calibrated(states, states, labels), calibrated(states, states, labels, regularization=1.0)
    assert found.fitted.regularization < given.fitted.regularization == 1.0


def one_above_all(count: int) -> tuple[np.ndarray, np.ndarray]:
    """States (count, 1) of which one harmless lies above all harmful ones."""
    labels = np.arange(count) % 2
    states = np.where(labels, 1.0, -1.0)[:, None] + 0.1 * np.random.default_rng(0).normal(size=(count, 1))
    states[0] = 50.0
    return states, labels


@pytest.mark.parametrize(
    ("gap", "options", "said"),
    [
        (0.0, {}, r"no usable probe: on these layers.*AUC 0\.[3-5].*--safety-layer"),
        (0.0, {"operations": ""}, r"no usable probe: without projection.*Try --projection semantic"),
        (1.5, {"threshold": 0.9999}, r"--threshold 0.9999, so the gate would refuse nothing.*0\.9\d\d"),
        (None, {"max_false_positive_rate": 0.0, "regularization": 1.0}, r"no usable probe|certain of 1 harmless"),
    ],
)
def test_no_usable_probe(
    calibrated: Callable[..., Calibration], gap: float | None, options: dict[str, Any], said: str
) -> None:
    """At chance, or where it catches nothing. A main lane that separates does not excuse the lane that is read."""
    states, labels = one_above_all(200) if gap is None else samples(200, 8, gap=gap)
    separable, _ = samples(200, states.shape[1], gap=8.0)
    with pytest.raises(CalibrationError, match=said) as caught:
        calibrated(states, separable, labels, **options)
    assert "\n" not in str(caught.value)


def test_a_probe_that_may_be_chance_is_none(calibrated: Callable[..., Calibration]) -> None:
    """It ranks, and catches some: but of so few prompts that as many ordinary ones might have been refused."""
    states, labels = samples(60, 8, gap=0.8, seed=1)
    said = r"no usable probe.*AUC 0\.[67].*% to .*%\) of 30 harmful.*% to .*%\) of 30 ordinary.*--calibration builtin"
    with pytest.raises(CalibrationError, match=said):
        calibrated(states, states, labels)
    many, labels = samples(1200, 8, gap=1.5, seed=1)
    assert not calibrated(many, many, labels).warnings()
    with pytest.raises(CalibrationError, match=r"another --threshold"):
        calibrated(many, many, labels, threshold=1e-6)  # which refuses everything


def test_a_channel_that_the_probe_is_worth_nothing_in_is_named(calibrated: Callable[..., Calibration]) -> None:
    states, labels = samples(400, 8, gap=5.0)
    picture = np.array([channel == "p" for channel in "tp" * 100 + "pt" * 100])
    states[picture] = samples(400, 8, gap=0.0, seed=3)[0][picture]
    (warning,) = calibrated(states, states, labels).warnings()
    assert re.match(r"picture prompts: .* of 100 harmful and .* of 100 ordinary ones are refused.*chance", warning)


def test_patching_with_several_data_sets(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Through the command, of prompts that even a random model tells apart."""
    one, other = (labelled.write_set(tmp_path, name, seed, 24) for seed, name in enumerate(("one", "other"), 1))
    options: dict[str, Any] = {"verify": "files", "max_false_positive_rate": 0.2, "calibration": one}
    arguments = flags(tiny_model("llava"), tmp_path / "out", **options)
    assert "96 prompts: AUC" in succeeds(*arguments, "--calibration", str(other)).stderr
    figures = json.loads((tmp_path / "out" / "sasa-calibration.json").read_text())["figures"]
    assert [figure["feature"] for figure in figures if figure["part"] == "all"] == ["projected", "plain"]


# ------------------------------------------------------------------------------------- features of a model


def chats(count: int, *, pictures: bool) -> list[Prompt]:
    """Prompts from the tiny models' own conversations."""
    found = []
    for number, chat in enumerate(tiny.conversations(images=pictures, count=count, seed=4)):
        content = chat[0]["content"]
        image = content[0]["image"] if content[0]["type"] == "image" else None
        load = None if image is None else (lambda image=image: image)
        channel = "text" if image is None else "picture"
        found.append(Prompt(f"chat {number}", content[-1]["text"], number % 2, str(number // 2), channel, "none", load))
    return found


def hooks_of_the_decoder(model: Any) -> int:
    """Hooks on its blocks and on its norm; transformers leaves some where hidden states were once asked for."""
    decoder = model.get_submodule(family_of(model.config.model_type).modules["blocks"].rpartition(".")[0])
    return sum(len(module._forward_hooks) for module in (*decoder.layers, decoder.norm))


@pytest.mark.parametrize("reach", [64, 8])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_features_are_those_of_the_oracle(stock: Stock, family: str, reach: int) -> None:
    """Both lanes, through the head, are the logits of two full passes with hooks, whatever the batches."""
    model, processor = stock(family)
    before = hooks_of_the_decoder(model)
    prompts = chats(5, pictures=True)
    settings = LaneSettings(1, 3, tokens=reach)
    lane = rewrite_lane(trace(model, family_of(family), encode(processor, prompts[:1])), settings)
    head = model.get_output_embeddings().weight.detach()  # (vocabulary, hidden)
    seen: list[int] = []
    for batch_size in (1, 3, 16):
        features = collect(model, processor, lane, prompts, batch_size=batch_size, advance=seen.append)
        assert features.projected.dtype == np.float32 and features.projected.shape == (5, 3 * tiny.HIDDEN)
        for row, prompt in enumerate(prompts):
            inputs = encode(processor, [prompt])
            projected = oracle.lane_logits(model, inputs, 1, 3, reach)  # (1, vocabulary)
            plain = oracle.plain_logits(model, inputs)  # (1, vocabulary)
            states = oracle.normed_states(model, inputs, (1, 3))[0].detach().numpy()  # (2 * hidden,)
            np.testing.assert_allclose(features.projected[row, tiny.HIDDEN :], states, rtol=0, atol=2e-4)
            for state, expected in ((features.projected, projected), (features.plain, plain)):
                found = head @ torch.from_numpy(state[row, : tiny.HIDDEN])  # (vocabulary,)
                torch.testing.assert_close(found, expected[0], rtol=0, atol=2e-4)
    assert sum(seen) == 15
    assert hooks_of_the_decoder(model) == before


@given(st.text(alphabet="tp", max_size=30), st.integers(1, 8))
def test_batches_hold_every_prompt_once_and_one_channel_each(channels: str, size: int) -> None:
    prompts = prompts_of([0] * len(channels), channels) if channels else []
    found = list(batches(prompts, size))
    assert sorted(row for batch in found for row in batch) == list(range(len(prompts)))
    for batch in found:
        assert 1 <= len(batch) <= size
        assert len({prompts[row].channel for row in batch}) == 1
