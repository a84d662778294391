"""Locating layers: a model with planted layers, each piece of evidence on its own, interruptions, and what users do."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import planted
import pytest
import tiny
import torch
from click.testing import CliRunner
from PIL import Image
from sklearn.metrics import roc_auc_score

from sasa_export import Options, SasaExportError, families, patch
from sasa_export.calibrate.data import Prompt, builtin
from sasa_export.calibrate.features import encode
from sasa_export.cli import main
from sasa_export.errors import EmitError
from sasa_export.locate import Located, LocateError, LocateOptions, locate
from sasa_export.locate.ablation import Heads
from sasa_export.locate.alignment import alignment, centred, cosines
from sasa_export.locate.expression import Expression, is_readable, vocabulary
from sasa_export.locate.family_file import with_entry
from sasa_export.locate.heads import HeadScores, degrees, leading
from sasa_export.locate.interval import auc_of, is_below, mean_of
from sasa_export.locate.lane import MainLane, watched
from sasa_export.locate.pairs import default_pairs, parse_blocks, parse_pairs, with_layer
from sasa_export.locate.prompts import ablated_on, controls, limited, spaced
from sasa_export.locate.propose import Proposal, cheapest, nearest, spans
from sasa_export.locate.run import _held_out
from sasa_export.locate.sweep import Sweep, halves
from sasa_export.locate.work import Work
from sasa_export.rewrite import LaneSettings, rewrite_lane
from sasa_export.trace import trace

Stock = Callable[..., tuple[Any, Any]]


@pytest.fixture(scope="session")
def planted_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted.build(tmp_path_factory.mktemp("planted") / "planted")


@pytest.fixture(scope="session")
def report(planted_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Located, Path]:
    """A whole run on the planted model, and its report."""
    out = tmp_path_factory.mktemp("located") / "report"
    located = locate(LocateOptions(str(planted_model), out, ablation_prompts=8), prompts=planted.prompts(24))
    assert located is not None
    return located, out


def quick(model: Path, out: Path, **settings: Any) -> LocateOptions:
    """A run of two pairs and two blocks' heads."""
    return LocateOptions(str(model), out, **{"ablation_prompts": 4, "blocks": "2-3", "pairs": "2:5,3:6", **settings})


# ------------------------------------------------------------------------------------- the planted model


def test_the_planted_layers_are_proposed(report: tuple[Located, Path]) -> None:
    proposal = report[0].proposal
    assert (proposal.safety, proposal.semantic) == (planted.SAFETY, planted.SEMANTIC)
    assert proposal.safety_blocks == (planted.SAFETY,)
    assert proposal.semantic_blocks == (planted.SEMANTIC, planted.SEMANTIC + 1)


def test_each_capability_appears_where_it_was_planted(report: tuple[Located, Path]) -> None:
    located = report[0]
    text = [estimate.value for estimate in located.separability.channels["text"]]
    assert text[: planted.SAFETY] == [0.5] * planted.SAFETY
    assert text[planted.SAFETY] > 0.95 and max(text[planted.SAFETY + 1 :]) < 0.9
    assert located.alignment is not None
    aligned = [estimate.value for estimate in located.alignment.text]
    assert aligned[: planted.SEMANTIC] == [0.0] * planted.SEMANTIC and aligned[planted.SEMANTIC] > 0.8
    alone = [estimate.value for estimate in located.alignment.image]
    assert alone[planted.SEMANTIC] == pytest.approx(1.0, abs=1e-3)
    assert located.expression.onset() == planted.VOICE
    assert located.expression.readable[planted.VOICE - 1] == 0.0
    # Only a second lane that begins at the planted layer ends in a separable state.
    auc = {pair: estimate.value for pair, estimate in located.sweep.pairs.items()}
    assert auc[planted.SAFETY, planted.SEMANTIC] > 0.99
    assert max(value for (safety, _), value in auc.items() if safety != planted.SAFETY) < 0.96
    assert located.sweep.plain.value < 0.9
    assert located.held_out.auc > 0.9


def test_all_pairs_together(report: tuple[Located, Path]) -> None:
    """The mean of the log-odds, which one strong pair among weak ones does not carry."""
    located, out = report
    odds = sum(np.log(scores / (1 - scores)) for scores in located.sweep.scores.values())  # (prompts,)
    labels = [prompt.label for prompt in planted.prompts(24)]
    together, chosen = located.sweep.together, located.sweep.pairs[planted.SAFETY, planted.SEMANTIC]
    assert together is not None and together.value == pytest.approx(roc_auc_score(labels, odds), abs=1e-6)
    assert 0.5 < together.value < chosen.value
    said = "which is not better than the chosen pair by more than noise"
    assert f"have an AUC of {together}, {said}." in (out / "report.md").read_text(encoding="utf-8")


def test_the_planted_safety_head_is_the_only_one(report: tuple[Located, Path]) -> None:
    heads = report[0].heads
    assert heads is not None
    assert [head[:2] for head in heads.safety_heads()] == [planted.SAFETY_HEAD]
    assert heads.centre() == planted.SAFETY
    assert heads.reliability is not None and heads.reliability > 0.5
    # Others turn both kinds of prompts, by more degrees than the safety head does.
    assert heads.ordinary[planted.VOICE, 1] > heads.harmful[planted.SAFETY_HEAD] > heads.ordinary[planted.SAFETY_HEAD]


def test_the_report_is_whole_and_needs_no_network(report: tuple[Located, Path]) -> None:
    located, out = report
    names = {"depth.png", "heads.png", "sweep.png", "tsne.png", "report.html", "report.md", "locate.json"}
    assert {path.name for path in out.iterdir()} == names
    assert [path.name for path in out.parent.iterdir()] == [out.name], "nothing is left beside the report"
    page = (out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|<script|<link|url\(|@import", page)
    sources = re.findall(r'(?:src|srcset|href)="(.{0,30})', page)
    assert len(sources) == 8 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    assert f"safety layer {planted.SAFETY}, semantic layer {planted.SEMANTIC}" in page
    for name in ("depth", "heads", "sweep", "tsne"):
        with Image.open(out / f"{name}.png") as picture:
            assert picture.format == "PNG" and picture.width == 910
            assert len(np.unique(np.asarray(picture))) > 10, "a picture of one colour shows nothing"
    data = json.loads((out / "locate.json").read_text(encoding="utf-8"))
    assert (data["proposal"]["safety_layer"], data["proposal"]["semantic_layer"]) == (planted.SAFETY, planted.SEMANTIC)
    assert len(data["safety_perception"]["all"]) == planted.BLOCKS and len(data["sweep"]["pairs"]) == 28
    assert "![" in (out / "report.md").read_text(encoding="utf-8") and located.subject.model == "planted"


def test_a_report_shows_any_token(report: tuple[Located, Path], tmp_path: Path) -> None:
    """What a model might say ends up in a table, so it must not end up as markup."""
    from sasa_export.locate.page import page

    located = report[0]
    strange = replace(located.example, words=(("<b>", "&amp", "a|b", "\n", "\ufffd"),) * planted.BLOCKS)
    text = page(replace(located, example=strange), *({name: b"" for name in ("depth", "heads", "sweep", "tsne")},) * 2)
    assert "<b>" not in text and "&lt;b&gt;" in text and "&amp;amp" in text


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


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "smolvlm"])
def test_a_whole_run_on_other_families(
    tiny_model: Callable[..., Path], family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sasa_export.locate.run.points", lambda states: states[:, :2])  # t-SNE knows no family
    options = quick(tiny_model(family), tmp_path / "report", pairs="1:3", blocks="2", limit=20, ablation_prompts=2)
    located = locate(options)
    assert located is not None and located.subject.family == family and located.subject.groups == 20
    assert (located.proposal.safety, located.proposal.semantic) == (1, 3)
    assert located.alignment is not None and located.alignment.requests == 40
    assert located.heads is not None and located.heads.scores.shape == (1, 4)
    assert located.heads.prompts == 2 and located.heads.reliability is None, "two prompts have no halves to compare"
    assert (tmp_path / "report/report.html").is_file()


# ---------------------------------------------------------------------------------------- interruptions


class Stop(BaseException):
    """Stands for Ctrl-C."""


@pytest.fixture(scope="session")
def uninterrupted(planted_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a quick run on 12 pairs."""
    out = tmp_path_factory.mktemp("whole") / "report"
    locate(quick(planted_model, out), prompts=planted.prompts(12))
    return out


@pytest.mark.parametrize("after", [3, 12])  # among the batches, among the heads
def test_an_interrupted_run_goes_on_and_ends_alike(
    planted_model: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    prompts = planted.prompts(12)
    put = Work.put
    written: list[str] = []

    def counted(self: Work, name: str, array: np.ndarray) -> None:
        if len(written) == after:
            raise Stop
        put(self, name, array)
        written.append(name)

    out = tmp_path / "cut/report"
    with monkeypatch.context() as patched:
        patched.setattr(Work, "put", counted)
        with pytest.raises(Stop):
            locate(quick(planted_model, out), prompts=prompts)
    assert not out.exists()
    left = {path.stem for path in (out.parent / ".report.work").glob("*.npy")}
    assert left == set(written) and len(left) == after

    again: list[str] = []

    def noted(self: Work, name: str, array: np.ndarray) -> None:
        again.append(name)
        put(self, name, array)

    with monkeypatch.context() as patched:
        patched.setattr(Work, "put", noted)
        located = locate(quick(planted_model, out), prompts=prompts)
    assert located is not None
    # What a batch's main lane left is written anew where the batch had not come to its end.
    assert not left & {name for name in again if "lane" in name or "block" in name}, "finished work was done again"
    for path in uninterrupted.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    assert [path.name for path in out.parent.iterdir()] == ["report"]


def test_other_settings_do_not_go_on_with_unfinished_work(
    planted_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any) -> None:
        raise Stop

    out = tmp_path / "report"
    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr(MainLane, "run", stop)
        locate(quick(planted_model, out), prompts=planted.prompts(12))
    assert not list(tmp_path.iterdir()), "nothing was finished, so there is nothing to go on with"
    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr("sasa_export.locate.run.survey", stop)
        locate(quick(planted_model, out), prompts=planted.prompts(12))
    with pytest.raises(LocateError, match=r"unfinished work of another run \(other: prompts\)"):
        locate(quick(planted_model, out), prompts=planted.prompts(13))
    with pytest.raises(LocateError, match="other: batch_size"):
        locate(quick(planted_model, out, batch_size=3), prompts=planted.prompts(12))
    repainted = [
        replace(prompt, image=lambda: Image.new("RGB", (32, 32), (9, 9, 9))) if prompt.image else prompt
        for prompt in planted.prompts(12)
    ]
    with pytest.raises(LocateError, match="other: prompts"):
        locate(quick(planted_model, out), prompts=repainted)
    monkeypatch.setattr("sasa_export.locate.run.write_report", lambda located, directory: None)
    assert locate(quick(planted_model, out, force=True), prompts=planted.prompts(13)) is not None


def test_work_that_cannot_be_used(tmp_path: Path) -> None:
    work = Work.beside(tmp_path / "report")
    assert work.open({"model": "a"}, discard=False) == 0
    work.put("one", np.arange(3.0))
    assert work.open({"model": "a"}, discard=False) == 1 and work.has("one") and work.get("one").tolist() == [0, 1, 2]
    with pytest.raises(LocateError, match="not finite"):
        work.put("two", np.array([1.0, math.nan]))
    assert not work.has("two")
    (work.folder / "one.npy").write_bytes(b"")
    with pytest.raises(LocateError, match=r"one\.npy is damaged"):
        work.get("one")
    with pytest.raises(LocateError, match="another run"):
        work.open({"model": "b"}, discard=False)
    assert work.open({"model": "b"}, discard=True) == 0 and not work.has("one")
    work.remove()
    assert not work.folder.exists()


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


# ---------------------------------------------------------------------------------------- family files


@pytest.fixture
def family_file(tmp_path: Path) -> Path:
    path = tmp_path / "llava.toml"
    path.write_text((families.directory() / "llava.toml").read_text(encoding="utf-8"), encoding="utf-8")
    return path


def test_the_layers_are_written_into_a_family_file(
    report: tuple[Located, Path], planted_model: Path, family_file: Path
) -> None:
    from sasa_export.locate.family_file import check_family, write_family
    from sasa_export.open import open_source

    located, source = report[0], open_source(str(planted_model))
    before = families.read(family_file)
    text = family_file.read_text(encoding="utf-8")
    check_family(family_file, source)
    write_family(family_file, source, located)
    entry = families.read(family_file).known_layers(planted.BLOCKS, planted.HIDDEN)
    assert entry is not None and (entry.safety, entry.semantic) == (planted.SAFETY, planted.SEMANTIC)
    assert entry.checkpoint == "planted" and "72 prompts" in entry.source
    assert families.read(family_file).layers[:-1] == before.layers
    assert family_file.read_text(encoding="utf-8").startswith(text.rstrip())

    # A second time it replaces its entry, and a new file begins as the family's own.
    other = replace(located, proposal=replace(located.proposal, safety=1))
    sweep = {**located.sweep.pairs}
    write_family(family_file, source, replace(other, sweep=replace(located.sweep, pairs=sweep)))
    again = families.read(family_file)
    assert len(again.layers) == len(before.layers) + 1
    assert again.known_layers(planted.BLOCKS, planted.HIDDEN).safety == 1  # type: ignore[union-attr]
    fresh = family_file.with_name("fresh.toml")
    write_family(fresh, source, located)
    assert families.read(fresh).modules == before.modules and len(families.read(fresh).layers) == len(before.layers) + 1
    assert sorted(path.name for path in family_file.parent.iterdir()) == ["fresh.toml", "llava.toml"]


def test_an_entry_is_replaced_where_it_stands() -> None:
    text = (
        'model_types = ["x"]\n\n[[layers]]\n# why\ncheckpoint = "a/b"\nblocks = 4\nhidden = 8\nsafety = 0\n'
        'semantic = 1\nsource = "old"\n\n# about the next\n'
        '[[layers]]\ncheckpoint = "c/d"\nblocks = 5\nhidden = 8\nsafety = 0\nsemantic = 1\n'
        'source = "[not a table]"\n\n[peculiar]\nmasks = "none"\n'
    )
    entry = families.KnownLayers("a/b", 4, 8, 1, 2, 'say "so" \\ é')
    found = with_entry(text, entry)
    assert found.count("[[layers]]") == 2 and '"old"' not in found and "# about the next\n[[layers]]" in found
    assert found.endswith('[peculiar]\nmasks = "none"\n')
    import tomllib

    layers = tomllib.loads(found)["layers"]
    assert layers[0]["source"] == 'say "so" \\ é' and layers[1]["source"] == "[not a table]"


def test_a_family_file_that_cannot_take_the_entry(
    report: tuple[Located, Path], planted_model: Path, family_file: Path
) -> None:
    """An inline list of layers is valid, and nothing can be put behind it: it stays as it is."""
    from sasa_export.locate.family_file import write_family
    from sasa_export.open import open_source

    text = family_file.read_text(encoding="utf-8").partition("[[layers]]")[0]
    inline = 'layers = [{checkpoint = "x", blocks = 8, hidden = 32, safety = 0, semantic = 1, source = "y"}]\n'
    family_file.write_text(inline + text, encoding="utf-8")
    with pytest.raises(SasaExportError):
        write_family(family_file, open_source(str(planted_model)), report[0])
    assert family_file.read_text(encoding="utf-8") == inline + text
    assert [path.name for path in family_file.parent.iterdir()] == [family_file.name]


# ------------------------------------------------------------------------------------- the command line


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["locate", *arguments])


def test_locate_from_the_command_line(planted_model: Path, tmp_path: Path, family_file: Path) -> None:
    lines = []
    for prompt in planted.prompts(12):
        if prompt.image is None:
            lines.append(
                json.dumps({"image": None, "prompt": prompt.prompt, "label": prompt.label, "group": prompt.group})
            )
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    arguments = ["--model", str(planted_model), "--out", str(tmp_path / "report"), "--calibration"]
    arguments += [str(tmp_path / "prompts.jsonl"), "--ablation-prompts", "0", "--write-family", str(family_file)]
    result = invoke(*arguments, "--pairs", "2:5,3:5")
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "report/locate.json").read_text(encoding="utf-8"))
    assert data["proposal"]["safety_layer"] == 2 and data["proposal"]["semantic_layer"] == 5
    assert data["safety_heads"] is None and data["semantic_understanding"] is None
    assert not (tmp_path / "report/heads.png").exists()
    assert families.read(family_file).known_layers(planted.BLOCKS, planted.HIDDEN) is not None
    # A report that is there is kept.
    result = invoke(*arguments)
    assert result.exit_code == 1 and "not empty" in result.output and result.output.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--limit", "0"), "--limit is 0"),
        (("--limit", "3"), "raise --limit"),
        (("--batch-size", "0"), "--batch-size is 0"),
        (("--ablation-prompts", "-1"), "--ablation-prompts is -1"),
        (("--ablation-prompts", "0", "--blocks", "1-2"), "leaves that out"),
        (("--blocks", "3-9"), "--blocks has '3-9'"),
        (("--pairs", "7:8"), "--pairs has '8'"),
        (("--write-family", "layers.json"), "ends in .toml"),
        (("--write-family", "nowhere/llava.toml"), "no folder"),
        (("--calibration", "nothing.jsonl"), "nothing.jsonl"),
        (("--device", "teapot"), "--device teapot"),
        (("--model", "teapot"), "no model 'teapot'"),
    ],
)
def test_errors_are_one_line(planted_model: Path, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    out = tmp_path / "room/report"
    out.parent.mkdir()
    model = () if "--model" in arguments else ("--model", str(planted_model))
    result = invoke(*model, "--out", str(out), *arguments)
    assert result.exit_code == 1 and said in result.output, result.output
    errors = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and not list(out.parent.iterdir()), "an error leaves nothing behind"


def test_another_familys_file(planted_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "gemma3.toml"
    path.write_text((families.directory() / "gemma3.toml").read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(LocateError, match="file of the model's own family"):
        locate(LocateOptions(str(planted_model), tmp_path / "report", write_family=path))


def test_the_model_itself_is_not_replaced(planted_model: Path) -> None:
    with pytest.raises(EmitError, match="source model"):
        locate(LocateOptions(str(planted_model), planted_model, force=True))
    assert (planted_model / "config.json").is_file()


# ---------------------------------------------------------------------------------- auto, in a patch


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted texts as a JSONL file."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    texts = [prompt for prompt in planted.prompts(48) if prompt.image is None]
    lines = [json.dumps({"image": None, "prompt": t.prompt, "label": t.label, "group": t.group}) for t in texts]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "safety, semantic, expected",
    [("auto", "auto", (2, 3)), ("auto", 5, (2, 5)), (2, "auto", (2, 3)), ("auto", None, (2, 3))],
)
def test_auto_layers(
    planted_model: Path, calibration: Path, tmp_path: Path, safety: Any, semantic: Any, expected: tuple[int, int]
) -> None:
    """Texts alone say nothing of meaning, so the semantic layer is merely the cheapest; the safety layer is planted."""
    options = Options(str(planted_model), tmp_path / "out", calibration=(str(calibration),), verify="files")
    patched = patch(replace(options, safety_layer=safety, semantic_layer=semantic))
    config = json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))["sasa"]
    assert (config["safety_layer"], config["semantic_layer"]) == expected
    assert "on one half of the calibration prompts" in config["layers_from"]
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert config["layers_from"] in card
    # The figures are of the half that took no part; the scores are of all.
    assert patched.calibration is not None
    figure = next(found for found in patched.calibration.figures if found.channel in ("all", "text"))
    assert figure.prompts == 48 and len(patched.calibration.prompts) == 96 and figure.auc > 0.95


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"safety_layer": "otto"}, "--safety-layer is 'otto'"),
        ({"safety_layer": "auto", "probe": Path("p.safetensors")}, "exclude each other"),
        ({"safety_layer": 7, "semantic_layer": "auto"}, "do not fit"),
    ],
)
def test_auto_that_cannot_be(planted_model: Path, tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SasaExportError, match=said):
        patch(Options(str(planted_model), tmp_path / "out", **settings))


def test_auto_on_the_command_line(planted_model: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(planted_model), "--out", str(tmp_path / "out"), "--safety-layer"]
    result = CliRunner().invoke(main, [*arguments, "otto"])
    assert result.exit_code == 2 and "neither a whole number nor 'auto'" in result.output
    short = tmp_path / "short.jsonl"
    record = {"image": None, "prompt": "tell me", "label": 0}
    lines = [json.dumps({**record, "label": row % 2, "group": f"{row // 2}"}) for row in range(24)]
    short.write_text("\n".join(lines), encoding="utf-8")
    result = CliRunner().invoke(main, [*arguments, "auto", "--calibration", str(short)])
    assert (
        result.exit_code == 1 and "6 groups with harmful prompts" in result.output and not (tmp_path / "out").exists()
    )
