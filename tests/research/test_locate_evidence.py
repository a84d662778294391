"""Each piece of evidence that `locate` goes by on its own: the second lane, figures, choices, prompts."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
import tiny
import torch

from sasa_export.errors import LocateError
from sasa_export.graph.rewrite import LaneSettings, rewrite_lane
from sasa_export.graph.trace import trace
from sasa_export.layers.capabilities import alignment, centred, is_readable, onset, token_texts
from sasa_export.layers.pairs import default_pairs, parse_pairs
from sasa_export.layers.prompts import controls, halves
from sasa_export.layers.propose import nearest, spans
from sasa_export.layers.survey import reading
from sasa_export.layers.sweep import cheapest
from sasa_export.models import family as families
from sasa_export.prompts import Prompt, builtin, encode

Stock = Callable[..., tuple[Any, Any]]
PICTURE = tiny.random_image(3)
ASKED = [
    Prompt(text, text, 0, text, "picture", "none", lambda: PICTURE)
    for text in ("what is in this image", "explain plainly which dog runs")
]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_second_lane_is_the_oracles(stock: Stock, family: str) -> None:
    model, processor = stock(family)
    inputs = tiny.prompts(processor, images=True, count=2, seed=0, padding_side="left")
    graph = trace(model, families.family_of(model.config.model_type), dict(inputs))
    cases = [(0, 1, 64), (4, 5, 64), (0, 1, 8)]  # safety layer, semantic layer, and over how many tokens
    lanes = {str(case): rewrite_lane(graph, LaneSettings(*case[:2], tokens=case[2])) for case in cases}
    with reading(model, processor, graph, lanes) as read:
        seconds = dict(read(ASKED, list(lanes)))  # (rows, hidden) each
    for case in cases:
        found = model.get_output_embeddings()(torch.from_numpy(seconds[str(case)]))  # (rows, vocabulary)
        expected = oracle.lane_logits(model, encode(processor, ASKED), *case)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------------- figures


def test_alignment_sees_what_requests_do_not_share() -> None:
    draw = np.random.default_rng(0)
    common, meaning = draw.normal(size=16) * 50, draw.normal(size=(40, 16))
    both, text, unrelated = meaning + common, 3 * meaning - common, draw.normal(size=(40, 16)) + common

    def aligned(*kinds: np.ndarray) -> list[float]:
        return [found.value for found in alignment(np.stack(kinds, axis=1), np.arange(40)).values()]

    alike, apart = aligned(both, text, unrelated)
    assert alike == pytest.approx(1.0) and abs(apart) < 0.2, "what all share hides that nothing else agrees"
    assert aligned(both * 0 + common, text, both) == [0.0, 0.0]
    rounding = np.full((4, 3), 7.0, np.float32) + np.float32(1e-6) * np.arange(12, dtype=np.float32).reshape(4, 3)
    assert not centred(rounding).any(), "rounding means nothing"


def test_where_words_begin() -> None:
    assert onset([0.2, 0.2, 0.2, 0.8, 0.9]) == 3
    assert onset([0.6, 0.1, 0.1, 0.5, 0.9]) == 3, "early chance does not count"
    assert onset([0.3, 0.3, 0.35]) is None and onset([0.9, 0.5, 0.1]) is None
    for text in ("Hello", " the", "ation", "don't", "l’homme", "well-known", "Straße", "мир", "世界"):
        assert is_readable(text), text
    for text in ("", " ", "a", "\n", "\ufffd", "th\ufffd", "42", "a1", "...", "<s>", "_x", "-ly", "dog's'", "a b"):
        assert not is_readable(text), text


def test_the_vocabulary_leaves_out_control_tokens(stock: Stock) -> None:
    model, processor = stock("llava")
    size = model.get_output_embeddings().weight.shape[0]
    texts = token_texts(processor.tokenizer, size)
    assert len(texts) == size > len(processor.tokenizer) and sum(map(is_readable, texts)) > 50
    assert all(texts[number] == "" for number in processor.tokenizer.all_special_ids)


# ----------------------------------------------------------------------------------- which are chosen


def test_the_choice_among_pairs() -> None:
    pairs = [(2, 4), (2, 8), (4, 8), (6, 8)]
    assert nearest(pairs, [4, 5], [8]) == [(4, 8)] and nearest(pairs, [5], [8]) == [(4, 8), (6, 8)]
    assert nearest(pairs, [0, 1], [3]) == [(2, 4)]
    assert cheapest([(2, 9), (5, 9), (5, 7)]) == (5, 7)
    assert spans([3]) == "block 3" and spans([5, 3, 4]) == "blocks 3 to 5"
    assert spans([1, 3, 4, 9]) == "blocks 1, 3 to 4, 9"


def test_the_default_grid() -> None:
    small, large = default_pairs(8), default_pairs(32)
    assert small == sorted(small) and all(safety < semantic for safety, semantic in small)
    assert len(small) == 28 and len(large) == 27 and (13, 15) in large and (22, 24) in large
    assert min(safety for safety, _ in large) == 5 and max(semantic for _, semantic in large) == 30
    assert default_pairs(32, 13) == [(13, layer) for layer in (15, 18, 22, 26, 30)]
    assert default_pairs(32, None, 16) == [(5, 16), (9, 16), (13, 16), (14, 16)]
    assert default_pairs(32, 30) == [(30, 31)] and default_pairs(32, None, 1) == [(0, 1)]


def test_pairs_that_users_give() -> None:
    assert parse_pairs("13:15", 32) == [(13, 15)] and parse_pairs("1-3:3, 0:1", 8) == [(0, 1), (1, 3), (2, 3)]
    assert parse_pairs("1-2:2-3,6:7", 8) == [(1, 2), (1, 3), (2, 3), (6, 7)]
    for text in ("", "13", "13-15", "a:b", "15:13", "3:3", "1:8", "1-2:7-8", "1:2:3", "5-2:7", "-1:2"):
        with pytest.raises(LocateError, match="--pairs"):
            parse_pairs(text, 8)


# --------------------------------------------------------------------------------------------- prompts


def test_the_controls_of_a_picture() -> None:
    prompts = [prompt for prompt in builtin() if not prompt.name.endswith("/long")][:120]
    texts = {prompt.name: prompt.prompt for prompt in prompts}
    found = controls(prompts)
    assert len(found) == 3 * 40
    for both, text, image in zip(found[::3], found[1::3], found[2::3], strict=True):
        assert text.image is None and text.prompt == texts[both.name.replace("picture", "text")], "the request in words"
        assert both.image is not None and image.image is both.image and image.prompt == ""
    assert controls(ASKED)[1].prompt == ASKED[0].prompt, "a picture that says nothing"
    assert controls([replace(ASKED[0], prompt=" ")]) == [] and controls(prompts[:1]) == []


def test_two_halves_share_no_group() -> None:
    prompts = builtin()
    first, second = halves(prompts)
    groups, categories = (
        [{getattr(prompts[row], name) for row in rows} for rows in (first, second)] for name in ("group", "category")
    )
    assert not groups[0] & groups[1] and abs(len(groups[0]) - len(groups[1])) <= 1
    assert sorted([*first, *second]) == list(range(len(prompts))) and categories[0] == categories[1]
