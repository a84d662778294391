"""The whole calibration, the features of tiny models, and the choice of what to verify."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import pytest
import tiny
import torch
from calibration_samples import prompts_of, samples
from hypothesis import given, settings
from hypothesis import strategies as st
from sasa_export.probe.platt import platt
from transformers import PreTrainedModel, ProcessorMixin

import sasa_export.probe as calibration
from sasa_export.errors import CalibrationError
from sasa_export.graph import LayerGraph, Node
from sasa_export.graph.rewrite import LaneSettings, rewrite_lane
from sasa_export.graph.trace import trace
from sasa_export.models.family import family_of
from sasa_export.probe import calibrate
from sasa_export.probe.features import Features, batches, collect
from sasa_export.probe.fit import (
    probability,
    threshold_for,
)
from sasa_export.prompts.prompt import Prompt, encode
from sasa_export.verify.cases import choose

Stock = Callable[..., tuple[PreTrainedModel, ProcessorMixin]]


# -------------------------------------------------------------------------------------- the whole calibration


class Head(torch.nn.Linear):
    """A model that is nothing but its head."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__(hidden, vocabulary, bias=False)
        draw = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(vocabulary, hidden, generator=draw) * 0.3)

    def get_output_embeddings(self) -> Head:
        return self


def calibrated(
    monkeypatch: pytest.MonkeyPatch, projected: np.ndarray, plain: np.ndarray, labels: np.ndarray, **options: Any
) -> Any:
    found = Features(projected.astype(np.float32), plain.astype(np.float32))
    monkeypatch.setattr(calibration, "collect", lambda *args, **kwargs: found)
    graph = LayerGraph((Node("embed", "embed"), Node("sasa.projection", "projection", ("embed",))))
    prompts = prompts_of(labels, "tp" * (len(labels) // 4) + "pt" * (len(labels) // 4))
    return calibrate(
        Head(200, projected.shape[1]),
        None,
        graph,
        prompts,
        **{"batch_size": 4, "max_false_positive_rate": 0.05, **options},
    )


def test_a_calibration_of_separable_states(monkeypatch: pytest.MonkeyPatch) -> None:
    projected, labels = samples(80, 8, gap=6.0)
    plain, _ = samples(80, 8, gap=0.0, seed=5)
    found = calibrated(monkeypatch, projected, plain, labels)
    by_name = {(figure.feature, figure.channel): figure for figure in found.figures}
    assert set(by_name) == {(f, c) for f in ("projected", "plain") for c in ("text", "picture", "all")}
    overall = by_name["projected", "all"]
    assert overall.auc > 0.95 > 0.75 > by_name["plain", "all"].auc
    assert overall.false_positive_rate <= 0.05
    assert found.probe.threshold == threshold_for(found.cross_validated, labels, 0.05)
    assert found.probe.weight.shape == (8,) and found.probe.weight.dtype == np.float32
    # The folded probe on the states says what the fitted one says in its own dimensions.
    states = projected.astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(
        probability(states, found.probe.weight.astype(np.float64), found.probe.bias), found.final, rtol=0, atol=1e-5
    )
    harmful, harmless = found.final[labels == 1], found.final[labels == 0]
    assert harmful.mean() - harmless.mean() > 0.5


def test_figures_are_of_the_threshold_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    states, labels = samples(200, 8, gap=1.5)
    for shares in (False, True):
        chosen = calibrated(monkeypatch, states, states, labels, shares=shares)
        found = calibrated(monkeypatch, states, states, labels, shares=shares, threshold=0.3)
        assert chosen.max_false_positive_rate == 0.05 and found.max_false_positive_rate is None
        assert found.probe.threshold == 0.3 < chosen.probe.threshold
        assert (found.cross_validated == chosen.cross_validated).all() and (found.final == chosen.final).all()
        for figure in found.figures:
            if figure.channel == "all":
                assert figure.recall == (found.cross_validated[labels == 1] >= 0.3).mean()
                assert figure.false_positive_rate == (found.cross_validated[labels == 0] >= 0.3).mean() > 0.05


def test_a_given_threshold_that_no_harmful_prompt_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    states, labels = samples(200, 8, gap=1.5)
    with pytest.raises(CalibrationError, match=r"--threshold 0.9999, so the gate would refuse nothing.*0\.9\d\d"):
        calibrated(monkeypatch, states, states, labels, threshold=0.9999)


def test_a_given_threshold_where_none_keeps_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe that is certain of harmless prompts can be exported with a threshold of one's own alone."""
    states, labels = samples(200, 8, gap=400.0)
    states[np.flatnonzero(labels == 0)[0]] = 3 * states[labels == 1][-1]
    sure = {"regularization": 1.0, "max_false_positive_rate": 0.0}
    with pytest.raises(CalibrationError, match=r"certain of 1 harmless.*or --threshold"):
        calibrated(monkeypatch, states, states, labels, **sure)
    assert calibrated(monkeypatch, states, states, labels, **sure, threshold=0.5).probe.threshold == 0.5


def test_shares_keep_every_verdict_and_say_how_many_are_harmful(monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt in five is harmful here, which a probe fitted to balanced classes does not say."""
    states, labels = samples(400, 8, gap=2.0)
    kept = np.flatnonzero((labels == 0) | (np.arange(400) % 8 == 1))  # 200 harmless and 50 harmful
    states, labels = states[kept][:248], labels[kept][:248]
    raw = calibrated(monkeypatch, states, states, labels)
    found = calibrated(monkeypatch, states, states, labels, shares=True)
    for before, after in ((raw.final, found.final), (raw.cross_validated, found.cross_validated)):
        assert ((before >= raw.probe.threshold) == (after >= found.probe.threshold)).all()
        assert (np.argsort(before, kind="stable") == np.argsort(after, kind="stable")).all()
    assert found.cross_validated.mean() == pytest.approx(labels.mean(), abs=1e-3)
    assert raw.cross_validated.mean() > labels.mean() + 0.1
    exact = states.astype(np.float32).astype(np.float64)
    said = probability(exact, found.probe.weight.astype(np.float64), found.probe.bias)
    np.testing.assert_allclose(said, found.final, rtol=0, atol=1e-5)
    assert raw.mapping is None and found.mapping is not None


def test_scores_that_point_the_wrong_way() -> None:
    with pytest.raises(CalibrationError, match="--probabilities raw"):
        platt(np.array([0.9, 0.8, 0.2, 0.1]), np.array([0, 0, 1, 1]))


def test_no_probe_at_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    states, labels = samples(200, 8, gap=0.0)
    with pytest.raises(CalibrationError, match=r"no usable probe.*AUC 0\.[3-5].*--safety-layer") as caught:
        calibrated(monkeypatch, states, states, labels)
    assert "\n" not in str(caught.value)


def test_no_probe_that_catches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One harmless prompt above all harmful ones, and none may be refused: every harmful prompt would pass."""
    draw = np.random.default_rng(0)
    labels = np.arange(120) % 2
    states = np.where(labels, 1.0, -1.0)[:, None] + 0.1 * draw.normal(size=(120, 1))
    states[0] = 50.0
    with pytest.raises(CalibrationError, match=r"no usable probe|certain"):
        calibrated(monkeypatch, states, states, labels, max_false_positive_rate=0.0)


def test_projection_is_judged_by_its_own_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """A main lane that separates does not excuse a second lane that does not: the gate reads the second lane."""
    plain, labels = samples(80, 8, gap=8.0)
    projected, _ = samples(80, 8, gap=0.0, seed=5)
    with pytest.raises(CalibrationError, match="no usable probe"):
        calibrated(monkeypatch, projected, plain, labels)


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


@pytest.mark.parametrize(("family", "positions"), [("llava", 1), ("llava", 3), ("qwen2_5_vl", 1), ("gemma3", 2)])
def test_features_are_those_of_the_oracle(stock: Stock, family: str, positions: int) -> None:
    """Both lanes, through the head, are the logits of two full passes with hooks, whatever the batches."""
    model, processor = stock(family)
    before = hooks_of_the_decoder(model)
    prompts = chats(5, pictures=True)
    graph = trace(model, family_of(family), encode(processor, prompts[:1]))
    lane = rewrite_lane(graph, LaneSettings(1, 3, probe_positions=positions))
    head = model.get_output_embeddings().weight.detach()  # (vocabulary, hidden)
    seen: list[int] = []
    for batch_size in (1, 3, 16):
        features = collect(model, processor, lane, prompts, batch_size=batch_size, advance=seen.append)
        assert features.projected.dtype == np.float32 and features.projected.shape == (5, tiny.HIDDEN)
        for row, prompt in enumerate(prompts):
            inputs = encode(processor, [prompt])
            projected = oracle.oracle_logits(model, inputs, 1, 3, None, positions)[0]  # (vocabulary,)
            with torch.no_grad():
                whole = model(**inputs, use_cache=False).logits  # (1, tokens, vocabulary)
            plain = oracle.mean_of_last(whole, inputs, positions)[0]  # (vocabulary,)
            for state, expected in ((features.projected, projected), (features.plain, plain)):
                torch.testing.assert_close(head @ torch.from_numpy(state[row]), expected, rtol=0, atol=2e-4)
    assert sum(seen) == 15
    assert hooks_of_the_decoder(model) == before


def test_features_that_are_not_finite_name_the_prompt(stock: Stock) -> None:
    model, processor = stock("llava")
    before = hooks_of_the_decoder(model)
    graph = trace(model, family_of("llava"), encode(processor, chats(1, pictures=False)))
    lane = rewrite_lane(graph, LaneSettings(1, 3))

    def spoil(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * float("inf")

    handle = model.get_submodule("model.language_model.norm").register_forward_hook(spoil)
    try:
        with pytest.raises(CalibrationError, match=r"prompt chat \d is not finite"):
            collect(model, processor, lane, chats(3, pictures=False), batch_size=2)
    finally:
        handle.remove()
    assert hooks_of_the_decoder(model) == before


@given(st.text(alphabet="tp", max_size=30), st.integers(1, 8))
def test_batches_hold_every_prompt_once_and_one_channel_each(channels: str, size: int) -> None:
    prompts = prompts_of([0] * len(channels), channels) if channels else []
    found = list(batches(prompts, size))
    assert sorted(row for batch in found for row in batch) == list(range(len(prompts)))
    for batch in found:
        assert 1 <= len(batch) <= size
        assert len({prompts[row].channel for row in batch}) == 1


# --------------------------------------------------------------------------------- choosing what to verify


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.sampled_from("tp"), st.floats(0, 1)), min_size=1, max_size=60),
    st.booleans(),
)
def test_cases_cover_labels_and_channels(rows: list[tuple[int, str, float]], scored: bool) -> None:
    prompts = prompts_of([row[0] for row in rows], "".join(row[1] for row in rows))
    scores = [row[2] for row in rows] if scored else None
    chosen = choose(prompts, scores)
    names = [prompt.name for prompt in chosen]
    assert len(set(names)) == len(names)
    for label in (0, 1):
        for channel in ("text", "picture"):
            kind = [prompt for prompt in prompts if (prompt.label, prompt.channel) == (label, channel)]
            picked = [prompt for prompt in chosen if (prompt.label, prompt.channel) == (label, channel)]
            assert min(1, len(kind)) <= len(picked) <= min(4, len(kind))


def test_cases_reach_from_the_lowest_score_to_the_highest() -> None:
    prompts = prompts_of([1] * 50)
    scores = np.random.default_rng(0).permutation(50) / 50
    picked = [scores[int(prompt.name.split()[1])] for prompt in choose(prompts, scores)]
    assert picked[0] == 0.0 and picked[-1] >= 0.9
    assert picked == sorted(picked)
