"""The bench that rows work on: a guarded model, the original beside it, prompts, and how both are compared.

Which prompts are harmful, the threshold decides: it is put between the scores that the oracle gives them.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import oracle
import pytest
import tiny
import torch
from conftest import Guard
from torch import Tensor

Inputs = dict[str, Any]
Way = Callable[[Any, Inputs], Tensor]  # a model and inputs -> what it says, (rows, tokens)
Check = Callable[["Bench"], None]
Transcript = list[tuple[list[int], Tensor]]  # a conversation: what stood before each answer, and the answer (1, tokens)

TOKENS = 14  # more than the refusal has
MARGIN = 1e-3  # between the oracle's P(unsafe) and a threshold that it should pass or miss


def generate(model: Any, inputs: Inputs, **options: Any) -> Tensor:
    """What `generate` adds to the prompts, (rows, tokens)."""
    torch.manual_seed(0)
    prompt = 0 if "inputs_embeds" in inputs else inputs["input_ids"].shape[1]
    said: Tensor = model.generate(**inputs, **{"max_new_tokens": TOKENS, **options})
    return said[:, prompt:]


def generating(**options: Any) -> Way:
    """The way of running that is `generate` with options."""
    return lambda model, inputs: generate(model, inputs, **options)


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

    # ------------------------------------------------------------------------------------------- prompts

    @cached_property
    def mixed(self) -> Inputs:
        """The batch that most rows use: padded on the left, most rows with a picture."""
        return self.batch(images=True)

    def batch(self, *, images: bool = False, side: Any = "left", count: int = 6, seed: int = 1) -> Inputs:
        """Prompts of different lengths."""
        return dict(tiny.prompts(self.guarded.processor, images=images, count=count, seed=seed, padding_side=side))

    @cached_property
    def singles(self) -> list[Inputs]:
        """A prompt, unpadded, or two that lie on both sides of a threshold that cannot be moved."""
        return self.told_apart([self.batch(count=1, seed=seed) for seed in range(8)])

    def told_apart(self, prompts: Sequence[Inputs]) -> list[Inputs]:
        if self.graphs is None:
            return [prompts[0]]
        ranked = sorted(prompts, key=lambda inputs: float(self.guarded.expected(inputs)))
        return [ranked[0], ranked[-1]]

    def chat(self, *messages: tuple[str, Any]) -> Inputs:
        """A conversation of (role, text, or parts of a message)."""
        parts = [[{"type": "text", "text": said}] if isinstance(said, str) else said for _, said in messages]
        chat = [{"role": role, "content": content} for (role, _), content in zip(messages, parts, strict=True)]
        return dict(tiny.encode(self.guarded.processor, [chat]))

    def ids_of(self, text: str) -> list[int]:
        """Text without the chat template, and without what the tokenizer puts before a text."""
        ids: list[int] = self.guarded.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def raw(self, text: str) -> Inputs:
        """Text without the chat template."""
        return self.of_ids(self.guarded.processor.tokenizer(text)["input_ids"])

    def of_ids(self, ids: list[int]) -> Inputs:
        """A row of token ids."""
        tokens = torch.tensor([ids])  # (1, tokens)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if self.guarded.family == "gemma3":
            inputs["token_type_ids"] = torch.zeros_like(tokens)
        return inputs

    @cached_property
    def turns(self) -> list[list[int]]:
        """What the turns of a conversation add, each with the generation prompt at its end."""
        texts = [chat[0]["content"][0]["text"] for chat in tiny.conversations(images=False, count=5, seed=8)]
        mark = "@@"
        chats = [self._template(("user", "hello"), ("assistant", mark), ("user", text)) for text in texts[1:]]
        first = self.chat(("user", texts[0]))["input_ids"][0].tolist()
        return [first, *(self.ids_of(chat.split(mark)[1]) for chat in chats)]

    def _template(self, *messages: tuple[str, str]) -> str:
        chat = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in messages]
        return str(self.guarded.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))

    # ------------------------------------------------------------------------------- verdicts, compared

    @contextmanager
    def threshold(self, value: float, model: Any = None) -> Iterator[None]:
        """Another threshold; that of graphs is written into them."""
        if self.graphs is not None:
            assert value == self.guarded.model.config.sasa["threshold"]
            yield
            return
        settings = (model or self.model).config.sasa
        before, settings["threshold"] = settings["threshold"], value
        try:
            yield
        finally:
            settings["threshold"] = before

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
        self,
        way: Way,
        prompts: list[Inputs],
        *,
        exactly: bool = True,
        models: tuple[Any, Any] | None = None,
        best_of: int = 1,
    ) -> None:
        """Run prompts of both verdicts, each call beside the original in the same way.

        Args:
            exactly: False where the refusal's tokens may come in another order.
            models: a guarded model and its original that were treated alike, in place of the bench's.
            best_of: only the first of so many answers to a prompt must be exact.
        """
        model, stock = models or (self.model, self.stock)
        verdicts: set[bool] = set()
        for inputs in prompts:
            logits = oracle.oracle_logits(
                stock, inputs, self.guarded.safety, self.guarded.semantic, self.guarded.model.config.sasa["probe_block"]
            )
            scores = oracle.unsafe_probability(logits, self.guarded.weight, self.guarded.bias)  # (rows,)
            expected = way(stock, copy.copy(inputs))
            for threshold in self.thresholds(scores):
                assert (scores - threshold).abs().min() > MARGIN / 2, "a score is too close to the threshold"
                with self.threshold(threshold, model):
                    found = way(model, copy.copy(inputs))
                refused = scores >= threshold  # (rows,)
                self.compare(found, expected, refused, exactly=exactly and best_of == 1)
                self.compare(found[::best_of], expected[::best_of], refused, exactly=exactly)
                verdicts |= set(refused.tolist())
        assert verdicts == {True, False}, "these prompts have one verdict only"

    def compare(self, found: Tensor, expected: Tensor, refused: Tensor, *, exactly: bool = True) -> None:
        """Refused rows emit the refusal, or its tokens at least; others are the original's.

        A batch that ends sooner is padded less. Several answers to a prompt follow one another.
        """
        several = len(found) // len(refused)
        assert len(found) == len(expected) == several * len(refused)
        refusal, ends = self.guarded.refusal, self.guarded.ends
        verdicts = refused.repeat_interleave(several).tolist()
        for said, other, refuse in zip(found.tolist(), expected.tolist(), verdicts, strict=True):
            wanted = refusal if refuse else other
            both = min(len(said), len(wanted))
            assert said, "nothing was said"
            if refuse and not exactly:
                assert set(said) <= {*refusal, *ends}, f"harmful answered: {said} instead of {refusal}"
            else:
                assert said[:both] == wanted[:both], f"{said} instead of {wanted}"
                assert {*said[both:], *(() if refuse else wanted[both:])} <= ends, f"{said} instead of {wanted}"

    @torch.no_grad()
    def check_turns(self, speak: Callable[[Any], Transcript]) -> None:
        """A conversation in which verdicts change to and fro; each answer is that to all that stood before it."""
        dry = torch.cat([self.guarded.expected(self.of_ids(before)) for before, _ in speak(self.stock)])  # (turns,)
        (threshold,) = self.thresholds(dry)
        with self.threshold(threshold):
            transcript = speak(self.model)
        verdicts = []
        for before, said in transcript:
            refused = self.guarded.expected(self.of_ids(before)) >= threshold  # (1,)
            self.compare(said, generate(self.stock, self.of_ids(before)), refused)
            verdicts.append(bool(refused))
        changes = set(pairwise(verdicts))
        assert {(True, False), (False, True)} <= changes, f"the verdicts do not change to and fro: {verdicts}"

    @torch.no_grad()
    def check_error(
        self, run: Callable[[Any], Any], message: str, kind: Any = (ValueError, NotImplementedError)
    ) -> None:
        """Running the model ends in an error that says `message`, whatever the verdict."""
        for value in (1e-6, 1 - 1e-6):
            with self.threshold(value), pytest.raises(kind, match=message):
                run(self.model)


# ------------------------------------------------------------------------------------------------- checks


def on_mixed(way: Way, **further: Any) -> Check:
    """A batch of both verdicts, with pictures."""
    return lambda bench: bench.check(way, [bench.mixed], **further)


def on_text(way: Way, **further: Any) -> Check:
    """A batch of both verdicts, without pictures."""
    return lambda bench: bench.check(way, [bench.batch()], **further)


def on_single(way: Way, **further: Any) -> Check:
    """A prompt on its own."""
    return lambda bench: bench.check(way, bench.singles, **further)


def on(prompts: Callable[[Bench], list[Inputs]], way: Way, **further: Any) -> Check:
    """Prompts of the row's own."""
    return lambda bench: bench.check(way, prompts(bench), **further)


def raises(run: Callable[[Bench, Any], Any], message: str, kind: Any = (ValueError, NotImplementedError)) -> Check:
    """A way that ends in an error."""
    return lambda bench: bench.check_error(lambda model: run(bench, model), message, kind)


def without(inputs: Mapping[str, Any], *names: str) -> Inputs:
    """Inputs but for some of them."""
    return {name: value for name, value in inputs.items() if name not in names}
