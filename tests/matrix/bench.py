"""The bench that torch's rows work on: a patched tiny model, the stock one beside it, and prompts of both verdicts.

Which prompts are harmful, the threshold decides: it is put between the scores that the oracle gives them.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import tiny
import torch
from conftest import Guard
from torch import Tensor

from matrix.outcome import HOLDS, LOUD, REFUSED, UNCHANGED, WORDS, Outcome, one_line

Inputs = dict[str, Any]
Way = Callable[[Any, Inputs], Tensor]  # a model and inputs -> what it says, (rows, tokens)
Named = dict[str, dict[str, Any]]  # options of `generate` by what a row calls them

TOKENS = 14  # more than the refusal has
MARGIN = 1e-3  # between the oracle's P(unsafe) and a threshold that it should pass or miss
EVERY = ("llava", "gemma3", "qwen2_5_vl")  # plain positions; sliding layers and picture masks; three position axes


def generate(model: Any, inputs: Inputs, *, seed: int = 0, **options: Any) -> Tensor:
    """What `generate` adds to the prompts, (rows, tokens)."""
    torch.manual_seed(seed)
    prompt = 0 if "inputs_embeds" in inputs else inputs["input_ids"].shape[1]
    said: Tensor = model.generate(**inputs, **{"max_new_tokens": TOKENS, **options})
    return said[:, prompt:]


def way(**options: Any) -> Way:
    """`generate` with options."""
    return lambda model, inputs: generate(model, inputs, **options)


@dataclass(frozen=True)
class Bench:
    guarded: Guard

    @property
    def model(self) -> Any:
        return self.guarded.model

    @property
    def stock(self) -> Any:
        return self.guarded.stock

    @property
    def tokenizer(self) -> Any:
        return self.guarded.processor.tokenizer

    @property
    def stops(self) -> frozenset[int]:
        """Tokens that end an answer."""
        ends = self.stock.generation_config.eos_token_id
        return frozenset(ends if isinstance(ends, list) else [ends])

    # ------------------------------------------------------------------------------------------- prompts

    def batch(self, *, images: bool = True, count: int = 4, seed: int = 1, side: Any = "left") -> Inputs:
        """Prompts of different lengths; with `images`, some rows still have none."""
        return dict(tiny.prompts(self.guarded.processor, images=images, count=count, seed=seed, padding_side=side))

    @cached_property
    def mixed(self) -> Inputs:
        """The batch that most rows use."""
        return self.batch()

    def one(self, *, images: bool = False, seed: int = 1) -> Inputs:
        """A single prompt, unpadded."""
        return self.batch(images=images, count=1, seed=seed)

    def chat(self, *messages: tuple[str, str]) -> Inputs:
        """A conversation of (role, text)."""
        chat = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in messages]
        return dict(tiny.encode(self.guarded.processor, [chat]))

    def raw(self, text: str) -> Inputs:
        """Text without the chat template."""
        return self.of_ids(self.tokenizer(text)["input_ids"])

    def of_ids(self, ids: list[int]) -> Inputs:
        """A row of token ids."""
        tokens = torch.tensor([ids])  # (1, tokens)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if self.guarded.family == "gemma3":
            inputs["token_type_ids"] = torch.zeros_like(tokens)
        return inputs

    # ------------------------------------------------------------------------------------- the threshold

    @contextmanager
    def threshold(self, value: float, *models: Any) -> Iterator[None]:
        """Another threshold for the patched model, or for further ones made from it."""
        settings = [model.config.sasa for model in (self.model, *models)]
        before = [one["threshold"] for one in settings]
        for one in settings:
            one["threshold"] = value
        try:
            yield
        finally:
            for one, old in zip(settings, before, strict=True):
                one["threshold"] = old

    def split(self, scores: Tensor) -> tuple[float, Tensor]:
        """A threshold in the widest gap of P(unsafe) (rows,), and which rows it refuses, (rows,)."""
        ordered = scores.sort().values  # (rows,)
        place = int(ordered.diff().argmax())
        assert ordered[place + 1] - ordered[place] > 2 * MARGIN, "the scores of this batch are too close"
        value = float(ordered[place : place + 2].mean())
        return value, scores >= value

    def between(self, low: float, high: float) -> float:
        """A threshold that a harmless prompt's P(unsafe) does not reach and a harmful one's does."""
        assert high - low > 4 * MARGIN, "these prompts are too much alike"
        return (low + high) / 2

    def steps(self, inputs: Inputs, answer: Tensor) -> Tensor:
        """The oracle's P(unsafe) before each token of a text prompt's answer (1, tokens): (tokens,)."""
        ids, said = inputs["input_ids"][0].tolist(), answer[0].tolist()
        return torch.cat([self.guarded.expected(self.of_ids(ids + said[:place])) for place in range(len(said))])

    # ---------------------------------------------------------------------------------------- comparing

    @torch.no_grad()
    def mixed_verdicts(
        self,
        run: Way,
        inputs: Inputs | None = None,
        *,
        model: Any = None,
        stock: Any = None,
        scores: Tensor | None = None,
        exactly: bool = True,
        best_of: int = 0,
    ) -> Outcome:
        """Run a batch of both verdicts, row by row beside the stock model in the same way.

        Args:
            model, stock: others than the bench's own.
            scores: the oracle's P(unsafe), (rows,), where it is not that of the inputs.
            exactly: False where the refusal's words may come in another order.
            best_of: only the first of so many answers to a prompt must be the refusal to the word.
        """
        inputs = self.mixed if inputs is None else inputs
        model, stock = model or self.model, stock or self.stock
        scores = self.guarded.expected(inputs) if scores is None else scores
        value, refused = self.split(scores)
        expected = run(stock, copy.copy(inputs))
        with self.threshold(value, model):
            found = run(model, copy.copy(inputs))
        self.unchanged(found, expected, refused)
        if best_of:
            self.refused(found, refused, exactly=False)
            found = found[::best_of]
        self.refused(found, refused, exactly=exactly)
        return HOLDS if exactly else Outcome(WORDS, UNCHANGED)

    @torch.no_grad()
    def both_verdicts(
        self,
        run: Way,
        inputs: Inputs,
        *,
        model: Any = None,
        stock: Any = None,
        judged: Inputs | None = None,
        exactly: bool = True,
    ) -> Outcome:
        """Run one prompt with the threshold just below its P(unsafe), then just above.

        Args:
            judged: what the oracle scores, where it is not the inputs.
        """
        model, stock = model or self.model, stock or self.stock
        score = self.guarded.expected(inputs if judged is None else judged)  # (1,)
        yes = torch.ones(1, dtype=torch.bool)
        with self.threshold(float(score) - MARGIN, model):
            self.refused(run(model, copy.copy(inputs)), yes, exactly=exactly)
        expected = run(stock, copy.copy(inputs))
        with self.threshold(float(score) + MARGIN, model):
            self.unchanged(run(model, copy.copy(inputs)), expected, ~yes)
        return HOLDS if exactly else Outcome(WORDS, UNCHANGED)

    def unchanged(self, found: Tensor, expected: Tensor, refused: Tensor) -> None:
        """Allowed rows are the stock model's; a batch that ends sooner is merely padded less."""
        several = found.shape[0] // refused.shape[0]
        assert found.shape[0] == expected.shape[0] == several * refused.shape[0]
        for index, refuse in enumerate(refused.repeat_interleave(several).tolist()):
            if not refuse:
                one, other = found[index].tolist(), expected[index].tolist()
                both = min(len(one), len(other))
                assert one[:both] == other[:both], f"harmless changed: {one} instead of {other}"
                assert set(one[both:] + other[both:]) <= self.guarded.ends, f"harmless changed: {one}, {other}"

    def refused(self, found: Tensor, refused: Tensor, *, exactly: bool = True) -> None:
        """Refused rows spell the refusal and end, or at least say nothing but words of it."""
        several = found.shape[0] // refused.shape[0]
        assert refused.any()
        refusal, ends = self.guarded.refusal, self.guarded.ends
        for index, refuse in enumerate(refused.repeat_interleave(several).tolist()):
            if refuse:
                said = found[index].tolist()
                assert said, "nothing was said, so nothing was refused"
                assert set(said) <= {*refusal, *ends}, f"harmful answered: {said} instead of {refusal}"
                if exactly:
                    assert said[: len(refusal)] == refusal[: len(said)], f"refusal garbled: {said}"
                    assert set(said[len(refusal) :]) <= ends, f"refusal does not end: {said}"

    @torch.no_grad()
    def loud(self, run: Callable[[], Any], message: str, *, kind: Any = (ValueError, NotImplementedError)) -> Outcome:
        """The way must end in an error that says `message`, for prompts of both verdicts."""
        said = ""
        for value in (1e-6, 1 - 1e-6):
            with self.threshold(value), pytest.raises(kind, match=message) as caught:
                run()
            said = one_line(caught.value)
        return Outcome(LOUD, LOUD, said)

    def like_stock(self, run: Way, inputs: Inputs, message: str, *, kind: Any) -> Outcome:
        """The way must end in an error with the stock model too, and with the same one."""
        for model in (self.stock, self.model):
            with pytest.raises(kind, match=message) as caught:
                run(model, copy.copy(inputs))
        return Outcome(LOUD, LOUD, f"the stock model cannot either ({one_line(caught.value)})")


def only_refused(outcome: Outcome) -> Outcome:
    """An outcome of a way that no harmless prompt was run in."""
    assert outcome.harmful in {REFUSED, WORDS}
    return outcome


def without(inputs: Mapping[str, Any], *names: str) -> Inputs:
    """Inputs but for some of them."""
    return {name: value for name, value in inputs.items() if name not in names}
