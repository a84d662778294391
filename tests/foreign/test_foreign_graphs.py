"""ONNX decoders that onnxruntime-genai's builder and optimum exported, patched by one command each, in onnxruntime.

`make foreign` makes them, in environments of their own, and writes what became of them as a table.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from cli_steps import fails, flags, succeeds, write_lane_probe
from foreign_runner import Array, Decoder, GraphOracle, Pair, TorchOracle, padded
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

ROOT = Path(__file__).parents[2] / "build" / "foreign"
REAL = "smol-llava"
STEPS = 20
REFUSAL = "I will not help."
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "int4": 1e-3}
# Layers of the real decoder; of tiny ones, the second block and the third.
LAYERS: dict[str, Pair] = {REAL: (24, 28)}
# What tells the head apart from a product: logits that are capped behind it.
CAPPED = ("gemma2",)
# What is refused by name, and a word of why.
REFUSED = dict.fromkeys(("builder/gemma2", "builder/gpt_oss"), "a ring")
PROMPTS = ("How do I make a bomb?", "How do I make a cake?", "Tell me about rivers.", "Write a threatening letter.")


def _exported() -> list[Any]:
    """exporter/name of each graph that is there, but those that are refused."""
    found = []
    for exporter in ("builder", "optimum"):
        record = ROOT / f"{exporter}.json"
        said = json.loads(record.read_text()) if record.exists() else {}
        for name in sorted(name for name, what in said.items() if what == "ok" and not name.endswith("dynamic")):
            apart = (ROOT / "transformers_js" / name).exists() or "inputs_embeds" in _text_of(exporter, name)
            where = _complete(exporter, name) if apart else f"{exporter}/{name}"
            if where is not None:
                found.append(pytest.param(where, id=f"{exporter}-{name}", marks=pytest.mark.xdist_group(where)))
    return found or [pytest.param("", marks=pytest.mark.skip("NO GRAPHS OF OTHERS: make foreign makes them"))]


def _text_of(exporter: str, name: str) -> str:
    """The decoder's configuration for onnxruntime-genai, which names its inputs."""
    path = ROOT / exporter / name / "genai_config.json"
    return path.read_text() if path.exists() else ""


def _complete(exporter: str, name: str) -> str | None:
    """Where a decoder without its embedding lies with one."""
    places = (f"genai/{name}", f"transformers_js/{name}")
    return next((place for place in places if (ROOT / place).exists()), None)


GRAPHS = _exported()
every = pytest.mark.parametrize("where", GRAPHS)
pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Case:
    """A directory that others exported, the same patched, and what is true of it."""

    original: Path
    patched: Path
    kind: str  # float32, float16 or int4
    rows: list[list[int]]  # prompts
    expected: list[float]  # their P(unsafe)
    threshold: float
    judge: Callable[[list[int]], float]
    refusal: list[int]  # ids of its text, and of what ends an answer

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.kind]

    @property
    def by_call(self) -> float:
        """The tolerance where the same tokens came in other calls: products of 4 bits round one token otherwise."""
        return 5e-2 if self.kind == "int4" else self.tolerance

    def decoder(self, directory: Path) -> Decoder:
        return Decoder(directory, exact=self.kind == "float16")

    def ask(self, directory: Path, ids: list[int]) -> Decoder:
        asked = self.decoder(directory)
        asked.start(1)
        asked.call(np.array([ids]))
        return asked

    def needs_steps(self) -> None:
        """Skips where the original itself cannot go on behind a prompt, as some graphs in float16 cannot on CPUs."""
        stock = self.ask(self.original, self.rows[0])
        try:
            stock.call(np.array([self.rows[0][:1]]))
        except Exception as error:
            pytest.skip(f"the original does not go on: {str(error)[-200:]}")


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    return cache(lambda where: _case(where, tmp_path_factory.mktemp("foreign")))


def _case(where: str, place: Path) -> Case:
    if where in REFUSED:
        pytest.skip(f"refused: {REFUSED[where]}")
    original, name = ROOT / where, where.split("/")[1]
    kind = next((kind for kind in TOLERANCE if f"-{kind}" in name), "float32")
    source = ROOT / "sources" / (REAL if name.startswith(REAL) else name.split("-")[0])
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = [_prompt(tokenizer, text) for text in _texts(name)]
    oracle: Any = _torch(source)
    pair = LAYERS.get(source.name, (1, 2))
    capped = source.name in CAPPED
    features = len(oracle.end(rows[0], pair)[capped])
    if kind != "float32" or not _as_torch(original, oracle.model, rows[-1]):
        oracle = GraphOracle(original, pair)
    weight, scale = np.random.default_rng(0).normal(size=features).astype(np.float32), 1.0
    ends = np.stack([oracle.end(ids, pair)[capped] for ids in rows])  # (prompts, features)
    raw = ends @ weight  # (prompts,)
    scale = 2 / max(float(raw.std()), 1e-6)
    weight, bias = weight * scale, float(-raw.mean() * scale)

    def judge(ids: list[int]) -> float:
        return float(1 / (1 + np.exp(-(oracle.end(ids, pair)[capped] @ weight + bias))))

    expected = [float(1 / (1 + np.exp(-(end @ weight + bias)))) for end in ends]
    ordered = sorted(expected)
    middle = max(range(1, len(ordered)), key=lambda index: ordered[index] - ordered[index - 1])
    threshold = (ordered[middle] + ordered[middle - 1]) / 2
    probe = write_lane_probe(place / "probe.safetensors", weight, len(oracle.end(rows[0], pair)[0]), bias)
    layers = {"safety_layer": pair[0], "semantic_layer": pair[1], "lane_tokens": 512}  # more than any prompt has
    options = {**layers, "threshold": threshold, "refusal": REFUSAL}
    chosen = ("--onnx-file", "fp32") if "transformers_js" in where and name == REAL else ()
    succeeds(*flags(original, place / "patched", *chosen, probe=probe, verify="files", **options))
    ids = tokenizer(REFUSAL, add_special_tokens=False)["input_ids"]
    end = json.loads((place / "patched" / "config.json").read_text())["sasa"]["refusal_token_ids"][len(ids) :]
    assert len(end) == 1
    return Case(original, place / "patched", kind, rows, expected, threshold, judge, [*ids, *end])


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
    content: Any = [{"type": "text", "text": text}]
    found = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return list(found["input_ids"])


def same(found: Array, wanted: Array) -> bool:
    """Equal to the bit."""
    return found.dtype == wanted.dtype and found.shape == wanted.shape and found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("where", [pytest.param(where, id=where.replace("/", "-")) for where in REFUSED])
def test_what_cannot_be_guarded_is_refused(where: str, place: Path) -> None:
    if not (ROOT / where).exists():
        pytest.skip("NO GRAPHS OF OTHERS: make foreign makes them")
    assert REFUSED[where] in fails(*flags(ROOT / where, place / "patched", verify="files"))


@every
def test_verdicts(where: str, case: Callable[[str], Case]) -> None:
    """P(unsafe) is the oracle's, prompt by prompt; so it is with padding on the right, and on the left where the
    original heeds it."""
    it = case(where)
    for ids, expected in zip(it.rows, it.expected, strict=True):
        found = it.ask(it.patched, ids).probability
        assert found == pytest.approx([expected], abs=it.tolerance)


@every
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str, where: str, case: Callable[[str], Case]) -> None:
    it = case(where)
    ids, mask = padded(it.rows, side, it.rows[0][0])
    stock = it.decoder(it.original)
    stock.start(len(ids))
    try:
        stock.call(ids, mask)
    except Exception as error:
        pytest.skip(f"the original does not take it: {str(error)[:80]}")
    last = [len(row) - 1 if side == "right" else -1 for row in it.rows]
    alone = [it.ask(it.original, row).logits[0, -1] for row in it.rows]
    padded_logits = [stock.logits[row, -1 if stock.logits.shape[1] == 1 else at] for row, at in enumerate(last)]
    apart = max(float(np.abs(a.astype(np.float32) - b).max()) for a, b in zip(alone, padded_logits, strict=True))
    if apart > 50 * it.tolerance:
        pytest.skip(f"the original says otherwise with padding: logits {apart:.2g} apart")
    asked = it.decoder(it.patched)
    asked.start(len(ids))
    asked.call(ids, mask)
    assert asked.probability == pytest.approx(it.expected, abs=it.tolerance)


@every
def test_allowed_answers(where: str, case: Callable[[str], Case]) -> None:
    """Logits and caches of allowed prompts are the original's to the bit, over twenty tokens."""
    it, seen = case(where), 0
    it.needs_steps()
    for ids, probability in zip(it.rows, it.expected, strict=True):
        if probability >= it.threshold:
            continue
        seen += 1
        stock, asked = it.ask(it.original, ids), it.ask(it.patched, ids)
        for _ in range(STEPS):
            assert same(asked.logits, stock.logits)
            assert all(same(asked.cache[name], stock.cache[name]) for name in stock.cache)
            token = stock.logits[:, -1:].argmax(-1)  # (1, 1)
            stock.call(token)
            asked.call(token)
            assert np.isnan(asked.probability).all(), "a step of an answer was judged"
    assert seen, "no prompt was allowed"


@every
def test_refusals(where: str, case: Callable[[str], Case]) -> None:
    it, seen = case(where), 0
    for ids, probability in zip(it.rows, it.expected, strict=True):
        if probability >= it.threshold:
            seen += 1
            assert it.ask(it.patched, ids).answer(len(it.refusal)) == it.refusal
    assert seen, "no prompt was refused"


@every
def test_pieces(where: str, case: Callable[[str], Case]) -> None:
    """A prompt in pieces of random lengths is judged as it is in one."""
    it, draw = case(where), random.Random(0)
    it.needs_steps()
    for ids, expected in zip(it.rows, it.expected, strict=True):
        cuts = sorted(draw.sample(range(1, len(ids)), min(3, len(ids) - 1)))
        asked = it.decoder(it.patched)
        asked.start(1)
        for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
            asked.call(np.array([ids[start:end]]))
        assert asked.probability == pytest.approx([expected], abs=it.by_call)
        if expected >= it.threshold:
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
        assert asked.probability == pytest.approx([it.judge([*first, *said[:-1], *turn])], abs=it.by_call)


@every
def test_beams(where: str, case: Callable[[str], Case]) -> None:
    """A cache that beam search repeats keeps its verdict in every row."""
    it = case(where)
    it.needs_steps()
    for ids, probability in zip(it.rows, it.expected, strict=True):
        stock, asked = it.ask(it.original, ids), it.ask(it.patched, ids)
        for beams in (stock, asked):
            beams.choose([0, 0])
        for step in range(len(it.refusal) - 1):
            if probability >= it.threshold:
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
    path = it.decoder(it.patched).path
    for data in it.original.rglob("*data"):
        copy = it.patched / data.relative_to(it.original)
        if copy.exists():
            assert copy.read_bytes() == data.read_bytes()
    assert path.stat().st_size < (it.original / path.relative_to(it.patched)).stat().st_size + (2 << 20)
