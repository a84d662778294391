"""A conversation of three turns, of which the oracle finds the middle one alone to be unsafe."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import tiny
import torch
from conftest import Guard
from torch import Tensor

from matrix.bench import TOKENS, Bench, generate
from matrix.outcome import HOLDS, Outcome

CANDIDATES = 10
ANSWER = "@@"


@dataclass(frozen=True)
class Turns:
    """The token ids that each turn adds, user's words and template, and a threshold that only the second passes."""

    bench: Bench
    words: list[list[int]]
    threshold: float

    @torch.no_grad()
    def compare(self, run: Callable[[Any], list[Tensor]]) -> Outcome:
        """Run all turns on the patched model; `run` gives what it says in each, (1, tokens)."""
        with self.bench.threshold(self.threshold):
            said = run(self.model)
        yes = torch.ones(1, dtype=torch.bool)
        self.bench.refused(said[1], yes)
        history: list[int] = []
        for turn, (words, answer) in enumerate(zip(self.words, said, strict=True)):
            history = [*history, *words]
            if turn != 1:
                expected = generate(self.bench.stock, self.bench.of_ids(history))
                self.bench.unchanged(answer, expected, ~yes)
            history += answer[0].tolist()
        return HOLDS

    @property
    def model(self) -> Any:
        return self.bench.model


def three_turns(bench: Bench) -> Turns:
    """Chosen among a few texts by the oracle's P(unsafe) of the whole conversation so far."""
    words, low, high = _chosen(bench.guarded)
    threshold = bench.between(low, high)
    return Turns(bench, words, threshold)


@cache
@torch.no_grad()
def _chosen(guarded: Guard) -> tuple[list[list[int]], float, float]:
    """What each turn adds, and P(unsafe) of the likelier of the safe turns and of the unsafe one."""
    bench = Bench(guarded)
    texts = [chat[0]["content"][0]["text"] for chat in tiny.conversations(images=False, count=CANDIDATES, seed=8)]
    first = [bench.chat(("user", text))["input_ids"][0].tolist() for text in texts]
    tails = [further_turn(bench, text) for text in texts]
    harmless = [words for words in first if not bench.guarded.ends & set(greedy_answer(bench, words))]
    safe, words = min((_score(bench, words), words) for words in harmless)
    history = words + greedy_answer(bench, words)
    unsafe, second = max((_score(bench, history + tail), tail) for tail in tails)
    history += second + guarded.refusal
    tails = [tail[1:] if tail[0] == guarded.refusal[-1] else tail for tail in tails]
    again, third = min((_score(bench, history + tail), tail) for tail in tails)
    return [words, second, third], max(safe, again), unsafe


def further_turn(bench: Bench, text: str) -> list[int]:
    """What a further user's turn adds behind an answer: its text within the template."""
    chat = [
        {"role": role, "content": [{"type": "text", "text": said}]}
        for role, said in (("user", "hello"), ("assistant", ANSWER), ("user", text))
    ]
    whole = bench.guarded.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids: list[int] = bench.tokenizer(whole.split(ANSWER)[1], add_special_tokens=False)["input_ids"]
    return ids


def greedy_answer(bench: Bench, words: list[int]) -> list[int]:
    said: list[int] = generate(bench.stock, bench.of_ids(words), max_new_tokens=TOKENS)[0].tolist()
    return said


def _score(bench: Bench, ids: list[int]) -> float:
    return float(bench.guarded.expected(bench.of_ids(ids)))
