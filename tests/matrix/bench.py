"""The bench that rows work on: a guarded model, the original beside it, prompts, and how both are compared.

Which prompts are harmful, the threshold decides: it is put between the scores that the oracle gives them.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import tiny
import torch
from conftest import Guard
from feeding import TOKENS
from torch import Tensor

Inputs = dict[str, Any]
Way = Callable[["Bench", Any, Inputs], Tensor]  # a bench, a model and inputs -> what it says, (rows, tokens)
Transcript = list[tuple[list[int], Tensor]]  # a conversation: what stood before each answer, and the answer (1, tokens)

MARGIN = 1e-3  # between the oracle's P(unsafe) and a threshold that it should pass or miss


@contextmanager
def begun_answers_allowed(model: Any) -> Iterator[None]:
    """A guarded model lets its callers begin answers, in a `with` block; any other is left as it is."""
    settings = getattr(model.config, "sasa", {})
    before, settings["begun_answers"] = settings.get("begun_answers", "error"), "allow"
    try:
        yield
    finally:
        settings["begun_answers"] = before


def generate(model: Any, inputs: Inputs, **options: Any) -> Tensor:
    """What `generate` adds to the prompts, (rows, tokens)."""
    torch.manual_seed(0)
    prompt = 0 if "inputs_embeds" in inputs else inputs["input_ids"].shape[1]
    said: Tensor = model.generate(**inputs, **{"max_new_tokens": TOKENS, **options})
    return said[:, prompt:]


def generating(**options: Any) -> Way:
    """The way of running that is `generate` with options."""
    return lambda bench, model, inputs: generate(model, inputs, **options)


@dataclass(frozen=True)
class Bench:
    """`graphs`, where given, are those of an ONNX directory, and run in place of the guarded torch model."""

    guarded: Guard
    graphs: Any = None

    @property
    def model(self) -> Any:
        return self.guarded.model if self.graphs is None else self.graphs

    @property
    def stock(self) -> Any:
        return self.guarded.stock

    @property
    def tokenizer(self) -> Any:
        return self.guarded.processor.tokenizer

    def batch(self, *, images: bool = False, side: Any = "left", count: int = 6, seed: int = 1) -> Inputs:
        """Prompts of different lengths, most with a picture if `images` are wanted."""
        return dict(tiny.prompts(self.guarded.processor, images=images, count=count, seed=seed, padding_side=side))

    def told_apart(self, prompts: Sequence[Inputs]) -> list[Inputs]:
        """One of some prompts, or two on both sides of a threshold that cannot be moved."""
        if self.graphs is None:
            return [prompts[0]]
        ranked = sorted(prompts, key=lambda inputs: float(self.guarded.expected(inputs)))
        return [ranked[0], ranked[-1]]

    def chat(self, *messages: tuple[str, Any]) -> Inputs:
        """A conversation of (role, text or parts of a message), up to the generation prompt."""
        parts = [[{"type": "text", "text": said}] if isinstance(said, str) else said for _, said in messages]
        chat = [{"role": role, "content": content} for (role, _), content in zip(messages, parts, strict=True)]
        return dict(tiny.encode(self.guarded.processor, [chat]))

    def raw(self, text: str) -> Inputs:
        """Text without the chat template."""
        return self.of_ids(self.tokenizer(text)["input_ids"])

    def of_ids(self, ids: list[int]) -> Inputs:
        """A row of token ids."""
        tokens = torch.tensor([ids])  # (1, tokens)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        return inputs | ({"token_type_ids": torch.zeros_like(tokens)} if self.guarded.family == "gemma3" else {})

    def threshold(self, value: float, model: Any = None) -> AbstractContextManager[None]:
        """Another threshold; that of graphs is written into them."""
        assert self.graphs is None or value == self.guarded.model.config.sasa["threshold"]
        return self.guarded.at(value, model)

    def thresholds(self, scores: Tensor) -> list[float]:
        """Thresholds to try for prompts of P(unsafe) (rows,): amid a batch, or just above and below a single prompt."""
        if self.graphs is not None:
            return [self.guarded.model.config.sasa["threshold"]]
        if len(scores) == 1:
            return [float(scores) - MARGIN, float(scores) + MARGIN]
        ordered = scores.sort().values  # (rows,)
        gap = int(ordered.diff().argmax())
        return [float(ordered[gap : gap + 2].mean())]

    @torch.no_grad()
    def check(
        self, way: Way, prompts: list[Inputs], *, exactly: bool = True, models: tuple[Any, Any] | None = None
    ) -> None:
        """Run prompts of both verdicts, beside the original in the same way.

        Args:
            exactly: False where the refusal's tokens may come in another order.
            models: a guarded model and its original that were treated alike, in place of the bench's.
        """
        model, stock = models or (self.model, self.stock)
        verdicts: set[bool] = set()
        for inputs in prompts:
            scores = self.guarded.expected(inputs, stock)  # (rows,)
            expected = way(self, stock, copy.copy(inputs))
            for threshold in self.thresholds(scores):
                assert (scores - threshold).abs().min() > MARGIN / 2, "a score is too close to the threshold"
                with self.threshold(threshold, models and model):
                    found = way(self, model, copy.copy(inputs))
                self.compare(found, expected, scores >= threshold, exactly=exactly)
                verdicts |= set((scores >= threshold).tolist())
        assert verdicts == {True, False}, "these prompts have one verdict only"

    def compare(self, found: Tensor, expected: Tensor, refused: Tensor, *, exactly: bool = True) -> None:
        """Refused rows emit the refusal, or at least its tokens alone; others are the original's.

        Args: found, expected: (rows * answers to each, tokens); refused: (rows,).
        """
        refused = refused.repeat_interleave(len(found) // len(refused))  # (rows * answers to each,)
        assert found.shape[1] and len(found) == len(expected)
        if not exactly:
            for said in found[refused].tolist():
                assert set(said) <= {*self.guarded.refusal, *self.guarded.ends}, f"harmful answered: {said}"
            found, expected, refused = found[~refused], expected[~refused], refused[~refused]
        self.guarded.check_answers(found, expected, refused)

    @torch.no_grad()
    def check_turns(self, speak: Callable[[Any], Transcript]) -> None:
        """A conversation in which verdicts change to and fro; each answer is that to all that stood before it."""
        scores = torch.cat([self.guarded.expected(self.of_ids(before)) for before, _ in speak(self.stock)])  # (turns,)
        tried = []
        for pair in pairwise(scores.sort(descending=True).values.unbind()):
            (threshold,) = self.thresholds(torch.stack(pair))
            with self.threshold(threshold):
                transcript = speak(self.model)
            verdicts = []
            for before, said in transcript:
                refused = self.guarded.expected(self.of_ids(before)) >= threshold  # (1,)
                self.compare(said, generate(self.stock, self.of_ids(before)), refused)
                verdicts.append(bool(refused))
            if {(True, False), (False, True)} <= set(pairwise(verdicts)):
                return
            tried.append(verdicts)
        raise AssertionError(f"the verdicts do not change to and fro: {tried}")

    @torch.no_grad()
    def check_error(self, run: Callable[[Any], Any], message: str) -> None:
        """Running the model ends in an error that says `message`, whatever the verdict."""
        for value in (1e-6, 1 - 1e-6):
            with self.threshold(value), pytest.raises((ValueError, NotImplementedError), match=message):
                run(self.model)


# What most rows are run on.


def mixed(bench: Bench) -> list[Inputs]:
    """A batch of both verdicts, padded on the left, most rows with a picture."""
    return [bench.batch(images=True)]


def mixed_text(bench: Bench) -> list[Inputs]:
    """A batch of both verdicts without pictures."""
    return [bench.batch()]


def single(bench: Bench) -> list[Inputs]:
    """A prompt on its own, unpadded."""
    return bench.told_apart([bench.batch(count=1, seed=seed) for seed in range(8)])
