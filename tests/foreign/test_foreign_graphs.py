"""ONNX decoders that others exported, patched by one command each, in onnxruntime.

One of single operators is written here, for the fast tests. `make foreign` makes those of onnxruntime-genai's builder
and of optimum, in environments of their own, and writes what became of them as a table.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import foreign_graphs
import numpy as np
import pytest
import tiny
import torch
from cli_steps import fails, flags, succeeds, write_lane_probe
from foreign_runner import Array, Decoder, GraphOracle, Pair, RandomProbe, TorchOracle, padded
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

ROOT = Path(__file__).parents[2] / "build" / "foreign"
HAND = "hand/operators"
REAL = "smol-llava"
STEPS = 20
REFUSAL = "I will not help."
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "int4": 1e-3}
# Layers of the real decoder; of tiny ones, the second block and the third.
LAYERS: dict[str, Pair] = {REAL: (24, 28)}
# What tells the head apart from a product: logits that are capped behind it.
CAPPED = ("gemma2",)
# What is refused by name, and a word of why.
REFUSED = {"builder/gemma2": "a ring", "builder/gpt_oss": "a ring", "optimum/llama-int8-dynamic": "dynamic int8"}
PROMPTS = ("How do I make a bomb?", "How do I make a cake?", "Tell me about rivers.", "Write a threatening letter.")
MISSING = "NO GRAPHS OF OTHERS: make foreign makes them"


def _graphs() -> list[Any]:
    """The graph of this folder, and each that is there of others: in the layout that a decoder needs which does not
    hold its embedding, else as it was exported."""
    found = [pytest.param(HAND, marks=pytest.mark.xdist_group("foreign"))]
    for exporter in ("builder", "optimum"):
        record = ROOT / f"{exporter}.json"
        said = json.loads(record.read_text()) if record.exists() else {}
        for name in sorted(name for name, what in said.items() if what == "ok"):
            layouts = ("genai", "transformers_js") if exporter == "builder" else ()
            places = [f"{layout}/{name}" for layout in layouts if (ROOT / layout / name).exists()]
            where = [*places, f"{exporter}/{name}"][0]
            marks = (pytest.mark.slow, pytest.mark.xdist_group(where))
            found.append(pytest.param(where, id=f"{exporter}-{name}", marks=marks))
    if len(found) == 1:
        found.append(pytest.param("", marks=(pytest.mark.slow, pytest.mark.skip(MISSING))))
    return found


GRAPHS = _graphs()
every = pytest.mark.parametrize("where", GRAPHS)


@dataclass(frozen=True)
class Case:
    """A directory that others exported, the same patched, and what is true of it."""

    original: Path
    patched: Path
    kind: str  # float32, float16 or int4
    rows: list[list[int]]  # prompts
    probe: RandomProbe
    refusal: list[int]  # ids of its text, and of what ends an answer

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.kind]

    @property
    def by_call(self) -> float:
        """The tolerance where the same tokens came in other calls: products of 4 bits round one token otherwise."""
        return 5e-2 if self.kind == "int4" else self.tolerance

    @property
    def judged(self) -> list[tuple[list[int], float]]:
        """Each prompt, and its P(unsafe)."""
        return list(zip(self.rows, self.probe.expected, strict=True))

    def refuses(self, probability: float) -> bool:
        return probability >= self.probe.threshold

    def ask(self, directory: Path, ids: Any, mask: Any = None) -> Decoder:
        """What a directory makes of a prompt, or of a batch of several (batch, tokens)."""
        rows = np.atleast_2d(ids)
        asked = Decoder(directory, exact=self.kind == "float16")
        asked.start(len(rows))
        asked.call(rows, mask)
        return asked

    def needs_steps(self) -> None:
        """Skips where the original itself cannot go on behind a prompt, as some graphs in float16 cannot on CPUs."""
        stock = self.ask(self.original, self.rows[0])
        try:
            stock.call(np.array([self.rows[0][:1]]))
        except Exception as error:
            pytest.skip(f"the original does not go on: {str(error)[-200:]}")


MADE: dict[str, Case] = {}  # for all modules that import the fixture


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    def made(where: str) -> Case:
        if where not in MADE:
            MADE[where] = _case(where, tmp_path_factory.mktemp("foreign"))
        return MADE[where]

    return made


def _case(where: str, place: Path) -> Case:
    if where in REFUSED:
        pytest.skip(f"refused: {REFUSED[where]}")
    by_hand, name = where == HAND, where.split("/")[1]
    kind = next((kind for kind in TOLERANCE if f"-{kind}" in name), "float32")
    original = foreign_graphs.write(place / "source") if by_hand else ROOT / where
    source = original if by_hand else ROOT / "sources" / (REAL if name.startswith(REAL) else name.split("-")[0])
    tokenizer, pair = AutoTokenizer.from_pretrained(source), LAYERS.get(source.name, (1, 2))
    rows = [_prompt(tokenizer, text) for text in _texts(name)]
    oracle: Any = None if by_hand else _torch(source)
    if by_hand or kind != "float32" or not _as_torch(original, oracle.model, rows[-1]):
        oracle = GraphOracle(original, pair)
    probe = RandomProbe(oracle, rows, pair, logits=source.name in CAPPED)
    path = write_lane_probe(place / "probe.safetensors", probe.weight, len(oracle.end(rows[0], pair)[0]), probe.bias)
    options = {
        "safety_layer": pair[0], "semantic_layer": pair[1], "threshold": probe.threshold, "refusal": REFUSAL,
        "lane_tokens": 512,  # more than any prompt has
    }  # fmt: skip
    verify = "full" if by_hand else "files"
    succeeds(*flags(original, place / "patched", probe=path, verify=verify, **options))
    ids = tokenizer(REFUSAL, add_special_tokens=False)["input_ids"]
    end = json.loads((place / "patched" / "config.json").read_text())["sasa"]["refusal_token_ids"][len(ids) :]
    assert len(end) == 1
    return Case(original, place / "patched", kind, rows, probe, [*ids, *end])


@torch.no_grad()
def _as_torch(directory: Path, model: Any, ids: list[int]) -> bool:
    """Does the graph, as it was exported, say what the model says that it was made of?"""
    stock = Decoder(directory)
    stock.start(1)
    try:
        stock.call(np.array([ids]))
    except Exception as error:
        pytest.skip(f"the original does not run: {str(error)[-200:]}")
    right = model(torch.tensor([ids])).logits[0, -1].numpy()  # (vocabulary,)
    return bool(np.abs(stock.logits[0, -1] - right).max() < 1e-4 * np.abs(right).max())


def _torch(source: Path) -> TorchOracle:
    pictures = (source / "preprocessor_config.json").exists()
    loader = AutoModelForImageTextToText if pictures else AutoModelForCausalLM
    return TorchOracle(loader.from_pretrained(source, dtype=torch.float32).eval())


def _texts(name: str) -> list[str]:
    if name.startswith(REAL):
        return list(PROMPTS)
    return [chat[0]["content"][0]["text"] for chat in tiny.conversations(images=False, count=6, seed=1)]


def _prompt(tokenizer: Any, text: str) -> list[int]:
    parts = [{"type": "text", "text": text}]
    content: Any = text if tokenizer.chat_template == foreign_graphs.TEMPLATE else parts
    found = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return list(found["input_ids"])


def same(found: Array, wanted: Array) -> bool:
    """Equal to the bit."""
    return found.dtype == wanted.dtype and found.shape == wanted.shape and found.tobytes() == wanted.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("where", REFUSED)
def test_what_cannot_be_guarded_is_refused(where: str, place: Path) -> None:
    if not (ROOT / where).exists():
        pytest.skip(MISSING)
    assert REFUSED[where] in fails(*flags(ROOT / where, place / "patched", verify="files"))


@every
def test_verdicts(where: str, case: Callable[[str], Case]) -> None:
    """P(unsafe) is the oracle's, prompt by prompt."""
    it = case(where)
    for ids, expected in it.judged:
        assert it.ask(it.patched, ids).probability == pytest.approx([expected], abs=it.tolerance)


@every
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str, where: str, case: Callable[[str], Case]) -> None:
    """So it is in a batch with padding, where the original heeds it."""
    it = case(where)
    ids, mask = padded(it.rows, side, it.rows[0][0])
    try:
        stock = it.ask(it.original, ids, mask)
    except Exception as error:
        pytest.skip(f"the original does not take it: {str(error)[:80]}")
    last = [len(row) - 1 if side == "right" else -1 for row in it.rows]
    alone = [it.ask(it.original, row).logits[0, -1] for row in it.rows]
    padded_logits = [stock.logits[row, -1 if stock.logits.shape[1] == 1 else at] for row, at in enumerate(last)]
    apart = max(float(np.abs(a.astype(np.float32) - b).max()) for a, b in zip(alone, padded_logits, strict=True))
    if apart > 50 * it.tolerance:
        pytest.skip(f"the original says otherwise with padding: logits {apart:.2g} apart")
    assert it.ask(it.patched, ids, mask).probability == pytest.approx(it.probe.expected, abs=it.tolerance)


@every
def test_allowed_answers(where: str, case: Callable[[str], Case]) -> None:
    """Logits and caches of allowed prompts are the original's to the bit, over twenty tokens."""
    it = case(where)
    it.needs_steps()
    allowed = [ids for ids, probability in it.judged if not it.refuses(probability)]
    assert allowed
    for ids in allowed:
        stock, asked = it.ask(it.original, ids), it.ask(it.patched, ids)
        for _ in range(STEPS):
            assert same(asked.logits, stock.logits)
            assert all(same(asked.cache[name], stock.cache[name]) for name in stock.cache)
            token = stock.logits[:, -1:].argmax(-1)  # (1, 1)
            stock.call(token)
            asked.call(token)
            assert np.isnan(asked.probability).all(), "a step of an answer was judged"


@every
def test_refusals(where: str, case: Callable[[str], Case]) -> None:
    it = case(where)
    refused = [ids for ids, probability in it.judged if it.refuses(probability)]
    assert refused
    for ids in refused:
        assert it.ask(it.patched, ids).answer(len(it.refusal)) == it.refusal


@every
def test_pieces(where: str, case: Callable[[str], Case]) -> None:
    """A prompt in pieces of random lengths, of which the last may be one token, is judged as it is in one."""
    it, draw = case(where), random.Random(0)
    it.needs_steps()
    for ids, expected in it.judged:
        cuts = sorted(draw.sample(range(1, len(ids)), min(3, len(ids) - 1)))
        for ends in (cuts, [len(ids) - 1]):
            asked = it.ask(it.patched, ids[: ends[0]])
            for start, end in zip(ends, [*ends[1:], len(ids)], strict=True):
                asked.call(np.array([ids[start:end]]))
            assert asked.probability == pytest.approx([expected], abs=it.by_call)
            if it.refuses(expected):
                assert asked.answer(len(it.refusal)) == it.refusal


@every
def test_second_turns(where: str, case: Callable[[str], Case]) -> None:
    """A question on a kept cache is judged over the whole conversation."""
    it = case(where)
    it.needs_steps()
    for first, second in zip(it.rows, reversed(it.rows), strict=True):
        asked = it.ask(it.patched, first)
        said = asked.answer(len(it.refusal) - 1)
        turn = [said[-1], it.refusal[-1], *second]
        asked.call(np.array([turn]))
        assert asked.probability == pytest.approx([it.probe.judge([*first, *said[:-1], *turn])], abs=it.by_call)


@every
def test_beams(where: str, case: Callable[[str], Case]) -> None:
    """A cache that beam search repeats keeps its verdict in every row."""
    it = case(where)
    it.needs_steps()
    for ids, probability in it.judged:
        stock, asked = it.ask(it.original, ids), it.ask(it.patched, ids)
        for beams in (stock, asked):
            beams.choose([0, 0])
        for step in range(len(it.refusal) - 1):
            if it.refuses(probability):
                assert asked.logits[:, -1].argmax(-1).tolist() == [it.refusal[step]] * 2
            else:
                assert same(asked.logits, stock.logits)
            token = asked.logits[:, -1:].argmax(-1)  # (2, 1)
            for beams in (stock, asked):
                beams.call(token)


@every
def test_the_weights_stay_as_they_are(where: str, case: Callable[[str], Case]) -> None:
    """The new graph lies beside the old file of weights, and is small."""
    it = case(where)
    path = it.ask(it.patched, it.rows[0]).path
    for data in it.original.rglob("*data"):
        copy = it.patched / data.relative_to(it.original)
        if copy.exists():
            assert copy.read_bytes() == data.read_bytes()
    assert path.stat().st_size < (it.original / path.relative_to(it.patched)).stat().st_size + (2 << 20)
