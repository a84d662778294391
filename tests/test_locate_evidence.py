"""Each piece of evidence that `locate` goes by on its own: parts of a model run again, figures, choices, prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
import tiny
import torch
from sklearn.metrics import roc_auc_score

from sasa_export.graph.rewrite import LaneSettings, rewrite_lane
from sasa_export.graph.trace import trace
from sasa_export.models import family as families
from sasa_export.prompts.prompt import Prompt, builtin, encode
from sasa_export.research.locate import LocateError
from sasa_export.research.locate.ablation import Heads
from sasa_export.research.locate.alignment import alignment, centred, cosines
from sasa_export.research.locate.expression import Expression, is_readable, vocabulary
from sasa_export.research.locate.heads import HeadScores, degrees, leading
from sasa_export.research.locate.interval import auc_of, is_below, mean_of
from sasa_export.research.locate.lane import MainLane, watched
from sasa_export.research.locate.pairs import default_pairs, parse_blocks, parse_pairs, with_layer
from sasa_export.research.locate.prompts import ablated_on, controls, limited, spaced
from sasa_export.research.locate.propose import Proposal, cheapest, nearest, spans
from sasa_export.research.locate.run import _held_out
from sasa_export.research.locate.sweep import Sweep, halves

Stock = Callable[..., tuple[Any, Any]]


# ------------------------------------------------------------------------------- running a part again


@contextmanager
def lane_of(stock: Stock, family: str) -> Iterator[MainLane]:
    model, processor = stock(family)
    inputs = tiny.prompts(processor, images=True, count=2, seed=0, padding_side="left")
    graph = trace(model, families.family_of(model.config.model_type), dict(inputs))
    with watched(model, processor, graph) as lane:
        yield lane


def some_prompts() -> list[Prompt]:
    """Two texts and two pictures of different lengths."""
    image = tiny.random_image(3)
    words = ["tell me how", "list three ideas to cook rice", "what is in this image", "explain plainly which dog runs"]
    return [
        Prompt(
            f"{row}",
            text,
            row % 2,
            f"{row}",
            "picture" if row > 1 else "text",
            "none",
            (lambda: image) if row > 1 else None,
        )
        for row, text in enumerate(words)
    ]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_blocks_run_again_as_they_ran(stock: Stock, family: str) -> None:
    """On what entered a block, it and those behind give the states that they gave, text and picture alike."""
    with lane_of(stock, family) as lane:
        for prompts in (some_prompts()[:2], some_prompts()[2:]):
            passed = lane.run(prompts)
            final = lane.normed(passed.last(passed.output(len(lane.modules) - 1)))  # (rows, hidden)
            for first in range(len(lane.modules)):
                torch.testing.assert_close(lane.again(passed, first), final, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_silenced_head_is_a_zeroed_slice(stock: Stock, family: str) -> None:
    """Against whole passes of the stock model, in which a hook zeroes the head for every row."""
    model, processor = stock(family)
    prompt = some_prompts()[3]
    with lane_of(stock, family) as lane:
        heads = Heads(lane)
        passed = lane.run([prompt] * 3)
        for block in (0, 3, len(lane.modules) - 1):
            with heads.silenced(block, [1, None, 3]):
                found = model.get_output_embeddings()(lane.again(passed, block))  # (rows, vocabulary)
            for row, head in enumerate((1, None, 3)):
                expected = _logits_without(model, encode(processor, [prompt]), block, head)  # (1, vocabulary)
                torch.testing.assert_close(found[row], expected[0], rtol=0, atol=1e-4)
            assert not torch.allclose(found[0], found[1], atol=1e-2), "a head that does nothing proves nothing"


def _logits_without(model: Any, inputs: dict[str, Any], block: int, head: int | None) -> torch.Tensor:
    attention: Any = oracle.blocks(model)[block].self_attn

    def zero(module: Any, args: tuple) -> tuple:
        state = args[0].clone()  # (rows, tokens, heads * size)
        size = state.shape[-1] // 4
        if head is not None:
            state[..., head * size : (head + 1) * size] = 0
        return (state,)

    handle = attention.o_proj.register_forward_pre_hook(zero)
    try:
        return oracle.plain_logits(model, inputs).detach()
    finally:
        handle.remove()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_second_lane_is_the_oracles(stock: Stock, family: str) -> None:
    model, processor = stock(family)
    prompts = some_prompts()[2:]
    with lane_of(stock, family) as lane:
        passed = lane.run(prompts)
        for pair in ((0, 1), (2, 4), (4, 5)):
            graph = rewrite_lane(lane.graph, LaneSettings(*pair))
            found = model.get_output_embeddings()(lane.second(passed, graph))  # (rows, vocabulary)
    expected = oracle.oracle_logits(model, encode(processor, prompts), *pair)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("seed", range(4))
def test_the_auc_and_its_interval(seed: int) -> None:
    """The AUC is scikit-learn's, ties included; the interval is as wide as resampling whole groups makes it."""
    draw = np.random.default_rng(seed)
    labels = np.tile([0, 1], 60)
    groups = [f"{row // 4}" for row in range(120)]
    shared = np.repeat(draw.normal(size=30), 4)
    scores = np.round(labels + shared + draw.normal(size=120), 1)
    estimate = auc_of(scores, labels, groups)
    assert estimate.value == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    drawn = []
    for _ in range(600):
        rows = np.concatenate([np.arange(4 * group, 4 * group + 4) for group in draw.integers(30, size=30)])
        drawn.append(roc_auc_score(labels[rows], scores[rows]))
    assert (estimate.high - estimate.low) / 2 / 1.96 == pytest.approx(np.std(drawn), rel=0.2)


def test_differences_are_judged_on_the_same_prompts() -> None:
    """Two scores that go up and down together differ clearly, where two as good and unrelated ones would not."""
    draw = np.random.default_rng(0)
    labels, groups = np.tile([0, 1], 100), [f"{row}" for row in range(200)]
    better = labels * 1.5 + draw.normal(size=200)
    worse = better - labels * 0.25
    first, second = auc_of(worse, labels, groups), auc_of(better, labels, groups)
    assert first.high > second.low, "each interval holds the other's figure"
    assert is_below(first, second) and not is_below(second, first) and not is_below(second, second)
    assert not is_below(mean_of(np.ones(4), groups[:4]), mean_of(np.ones(4) + 1e-12, groups[:4]))
    unrelated = auc_of(labels * 1.4 + draw.normal(size=200), labels, groups)
    assert not is_below(unrelated, second, among=30)


def test_perfect_and_useless_scores() -> None:
    labels, groups = np.tile([0, 1], 20), [f"{row}" for row in range(40)]
    perfect, useless = auc_of(labels.astype(float), labels, groups), auc_of(np.zeros(40), labels, groups)
    assert (perfect.value, perfect.low, perfect.high) == (1.0, 1.0, 1.0)
    assert (useless.value, useless.low, useless.high) == (0.5, 0.5, 0.5)


def test_alignment_sees_what_requests_do_not_share() -> None:
    draw = np.random.default_rng(0)
    common, meaning = draw.normal(size=16) * 50, draw.normal(size=(40, 16))
    groups = [f"{row}" for row in range(40)]
    both, text = meaning + common, 3 * meaning - common
    unrelated = draw.normal(size=(40, 16)) + common
    found = alignment([(both, text, unrelated), (unrelated, text, both), (both * 0 + common, text, both)], groups)
    assert found.text[0].value == pytest.approx(1.0) and abs(found.image[0].value) < 0.2
    assert found.raw_image[0] > 0.95, "what all share hides that nothing else agrees"
    assert abs(found.text[1].value) < 0.2 and found.text[2].value == 0.0
    assert found.blocks_within_noise(3) == [0] and found.blocks_within_noise(1) == [0]


def test_cosines_of_nothing() -> None:
    assert cosines(np.zeros((2, 3)), np.ones((2, 3))).tolist() == [0.0, 0.0]
    states = np.full((4, 3), 7.0, np.float32) + np.float32(1e-6) * np.arange(12, dtype=np.float32).reshape(4, 3)
    assert not centred(states).any(), "rounding means nothing"


@pytest.mark.parametrize("piece", ["Hello", " the", "ation", "don't", "l’homme", "well-known", "Straße", "мир", "世界"])
def test_readable(piece: str) -> None:
    assert is_readable(piece)


@pytest.mark.parametrize(
    "piece", ["", " ", "a", "\n", "\ufffd", "th\ufffd", "42", "a1", "...", "<s>", "_x", "-ly", "dog's'", "a b"]
)
def test_not_readable(piece: str) -> None:
    assert not is_readable(piece)


def test_the_vocabulary_leaves_out_control_tokens(stock: Stock) -> None:
    model, processor = stock("llava")
    size = model.get_output_embeddings().weight.shape[0]
    pieces = vocabulary(processor.tokenizer, size)
    assert len(pieces) == size > len(processor.tokenizer)
    assert all(pieces[number] == "" for number in processor.tokenizer.all_special_ids)
    assert sum(map(is_readable, pieces)) > 50


@pytest.mark.parametrize(
    "readable, onset",
    [
        ([0.2, 0.2, 0.2, 0.8, 0.9], 3),
        ([0.6, 0.1, 0.1, 0.5, 0.9], 3),  # early chance does not count
        ([0.3, 0.3, 0.35], None),
        ([0.9, 0.5, 0.1], None),
    ],
)
def test_where_words_begin(readable: list[float], onset: int | None) -> None:
    assert Expression(tuple(readable), tuple(readable), 0.3).onset() == onset


def test_angles() -> None:
    first = np.array([1.0, 0.0, 0.0])
    for angle in (1e-6, 0.3, 45.0, 89.9):
        turned = np.array([math.cos(math.radians(angle)), math.sin(math.radians(angle)), 0.0])
        assert degrees(first, turned) == pytest.approx(angle, rel=1e-6)
        assert degrees(first, -turned) == pytest.approx(angle, rel=1e-6), "a singular vector has no sign"
    states = np.outer(np.arange(1.0, 6.0), [3.0, 4.0]) + 0.01 * np.random.default_rng(0).normal(size=(5, 2))
    assert degrees(leading(states), np.array([0.6, 0.8])) < 1


def test_which_heads_are_safety_heads() -> None:
    draw = np.random.default_rng(0)
    noise = np.abs(draw.normal(size=(6, 8))) * 0.1
    harmful, ordinary = noise.copy(), noise + draw.normal(size=(6, 8)) * 0.01
    harmful[2, 3], ordinary[2, 3] = 5.0, 0.5
    harmful[3, 1], ordinary[3, 1] = 4.0, 1.0
    harmful[4, 4], ordinary[4, 4] = 9.0, 8.0  # matters to everything
    harmful[5, 5], ordinary[5, 5] = 0.1, 6.0  # matters to ordinary prompts
    found = HeadScores(tuple(range(10, 16)), harmful, ordinary, 16, 0.9)
    assert [head[:2] for head in found.safety_heads()] == [(12, 3), (13, 1)]
    assert found.centre() == 12
    assert HeadScores((0,), noise[:1], noise[:1], 16, 0.0).safety_heads() == []
    assert HeadScores((0,), noise[:1], noise[:1], 16, 0.0).centre() is None


# ----------------------------------------------------------------------------------- which are chosen


def sweep_of(values: dict[tuple[int, int], float]) -> Sweep:
    """A sweep of made-up AUCs, each with a standard error of 0.01 that no two share."""
    labels, groups = np.tile([0, 1], 50), [f"{row}" for row in range(100)]
    like = auc_of(labels.astype(float), labels, groups)
    pull = np.full(100, 0.001)
    pairs = {
        pair: replace(like, value=value, pull=pull * (-1.0) ** (np.arange(100) // 2**place))
        for place, (pair, value) in enumerate(values.items())
    }
    return Sweep(pairs, like, {})


def test_ties_go_to_the_cheapest() -> None:
    swept = sweep_of({(2, 9): 0.90, (5, 9): 0.89, (5, 7): 0.885, (8, 9): 0.80})
    assert swept.best() == (2, 9)
    tied = swept.tied(list(swept.pairs))
    assert tied == [(2, 9), (5, 9), (5, 7)], "0.80 is ten standard errors away"
    assert cheapest(tied) == (5, 7)


def test_the_nearest_pairs() -> None:
    pairs = [(2, 4), (2, 8), (4, 8), (6, 8)]
    assert nearest(pairs, [4, 5], [8]) == [(4, 8)]
    assert nearest(pairs, [5], [8]) == [(4, 8), (6, 8)]
    assert nearest(pairs, [0, 1], [3]) == [(2, 4)]


def test_blocks_in_words() -> None:
    assert (
        spans([3]) == "block 3"
        and spans([5, 3, 4]) == "blocks 3 to 5"
        and spans([1, 3, 4, 9]) == "blocks 1, 3 to 4 and 9"
    )


def test_the_default_grid() -> None:
    small, large = default_pairs(8), default_pairs(32, known=(13, 15))
    assert small == sorted(small) and all(safety < semantic for safety, semantic in small)
    assert len(small) == 28 and len(large) == 27 and (13, 15) in large and (22, 24) in large
    assert min(safety for safety, _ in large) == 5 and max(semantic for _, semantic in large) == 30
    assert with_layer(32, 13, None) == [(13, layer) for layer in (15, 18, 22, 26, 30)]
    assert all(pair[1] == 15 > pair[0] for pair in with_layer(32, None, 15)) and len(with_layer(32, None, 15)) >= 2
    assert with_layer(32, 30, None) == [(30, 31)] and with_layer(32, None, 1) == [(0, 1)]


def test_pairs_and_blocks_that_users_give() -> None:
    assert parse_pairs("13:15", 32) == [(13, 15)]
    assert parse_pairs("1-3:3, 0:1", 8) == [(0, 1), (1, 3), (2, 3)]
    assert parse_blocks("8-10,3", 32) == [3, 8, 9, 10]


@pytest.mark.parametrize("text", ["", "13", "13-15", "a:b", "15:13", "3:3", "1:8", "1:2:3", "5-2:7", "-1:2"])
def test_pairs_that_are_none(text: str) -> None:
    with pytest.raises(LocateError, match="--pairs"):
        parse_pairs(text, 8)


# --------------------------------------------------------------------------------------------- prompts


def test_a_share_of_the_prompts() -> None:
    prompts = builtin(None)
    chosen = limited(prompts, 40)
    assert len({prompt.group for prompt in chosen}) == 40 and len(chosen) == 160
    assert len({prompt.category for prompt in chosen}) == len({prompt.category for prompt in prompts})
    assert limited(prompts, None) == prompts == limited(prompts, 10**6)
    with pytest.raises(LocateError, match="there are 6 groups with harmful prompts"):
        limited(prompts, 6)


def test_the_controls_of_a_picture() -> None:
    prompts = builtin(None)[:80]
    found = controls(prompts)
    assert len(found) == 40
    texts = {prompt.name: prompt.prompt for prompt in prompts}
    for control in found:
        assert control.both.image is not None and control.text.image is None
        assert control.text.prompt == texts[control.both.name.replace("picture", "text")], "the request in words"
        assert control.image.image is control.both.image and control.image.prompt == ""
    plain = Prompt("p", "What is this?", 0, "g", "picture", "none", lambda: tiny.random_image(0))
    assert controls([plain])[0].text.prompt == "What is this?"
    assert controls([replace(plain, prompt=" ")]) == [] and controls(prompts[:1]) == []


def test_the_heads_see_as_many_pictures_of_either_label() -> None:
    found = ablated_on(builtin(None), 16)
    prompts = builtin(None)
    for label in (1, 0):
        rows = found[label]
        assert len(rows) == 16 and {prompts[row].label for row in rows} == {label}
        assert sum(prompts[row].channel == "picture" for row in rows) == 8
    lopsided = [prompt for prompt in prompts if prompt.label == 0 or prompt.channel == "text"]
    for rows in ablated_on(lopsided, 8).values():
        assert len(rows) == 8 and {lopsided[row].channel for row in rows} == {"text"}
    apart = [prompt for prompt in prompts if (prompt.label == 1) == (prompt.channel == "text")]
    with pytest.raises(LocateError, match="--ablation-prompts 0"):
        ablated_on(apart, 8)


def test_an_overruled_choice_is_judged_among_all_pairs() -> None:
    """What the halves choose from is what the proposal chose from."""
    labels = np.arange(160) % 2
    prompts = [Prompt(f"p{row}", "words", int(row % 2), f"g{row // 2}", "text", "none") for row in range(160)]
    draw = np.random.default_rng(0)
    scores = {(1, 2): draw.random(160), (3, 4): np.clip(labels * 0.4 + draw.random(160) * 0.6, 0.01, 0.99)}
    groups = [prompt.group for prompt in prompts]
    aucs = {pair: auc_of(found, labels, groups) for pair, found in scores.items()}
    swept = Sweep(aucs, aucs[1, 2], scores)
    evidence = ((1,), (2,), ((1, 2),))  # points to the worse pair
    overruled = _held_out(swept, Proposal(3, 4, *evidence, ((3, 4),), ()), prompts)
    assert overruled.pairs == ((3, 4), (3, 4)) and overruled.auc > 0.8
    followed = _held_out(swept, Proposal(1, 2, *evidence, ((1, 2),), ()), prompts)
    assert followed.pairs == ((1, 2), (1, 2)) and followed.auc < 0.65


def test_two_halves_share_no_group() -> None:
    prompts = builtin(None)
    first, second = halves(prompts)
    groups = [{prompts[row].group for row in rows} for rows in (first, second)]
    assert not groups[0] & groups[1] and len(groups[0]) == len(groups[1]) == 190
    assert sorted([*first, *second]) == list(range(len(prompts)))
    categories = [{prompts[row].category for row in rows} for rows in (first, second)]
    assert categories[0] == categories[1]


def test_spaced() -> None:
    assert spaced(range(10), 3) == [1, 5, 8] and spaced("abc", 9) == ["a", "b", "c"] and spaced(range(5), 0) == []
