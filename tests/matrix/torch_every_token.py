"""`--gate every-token`: an answer is judged at each of its tokens, in whatever way it is said.

A row runs one prompt at three thresholds: below its P(unsafe), above that of every step of its answer, and between,
where the answer turns unsafe on its way.
"""

import copy
import itertools
import tempfile
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from matrix.bench import EVERY, MARGIN, Bench, Inputs, Named, Way, generate, way
from matrix.by_hand import ByHand, chunks, fed
from matrix.outcome import HOLDS, NOT_ASKED, REFUSED, Outcome, row
from matrix.torch_caches import cache_of, quanto_without_a_compiler
from matrix.torch_drafts import helper

SECTION = "Every token judged"
TEXTS = [
    f"please tell me how to cook {more}" for more in ("rice", "rice with apples", "when the dog ran", "a red house")
]
TURNS = "an answer that turns unsafe is the stock model's up to there, and ends in the refusal"


def turn(scores: Tensor) -> int | None:
    """The first step, from the second on, whose score is above all before it; the prompt's own is the first."""
    for place in range(2, len(scores)):
        if scores[place] > scores[:place].max() + 4 * MARGIN:
            return place
    return None


@torch.no_grad()
def turning(bench: Bench) -> Inputs:
    """A text prompt whose greedy answer turns unsafe at its third token or later."""
    for seed in range(20):
        inputs = bench.one(seed=seed)
        if turn(bench.steps(inputs, generate(bench.stock, inputs))) is not None:
            return inputs
    raise AssertionError("no answer of this model turns")


@torch.no_grad()
def at_each_token(bench: Bench, run: Way, *, model: Any = None, turns: bool = True) -> Outcome:
    """All three thresholds; without `turns`, as beams are weighed by what was refused, the outer two."""
    model = model or bench.model
    inputs, yes = turning(bench), torch.ones(1, dtype=torch.bool)
    expected = run(bench.stock, copy.copy(inputs))  # (1, tokens)
    scores = bench.steps(inputs, expected)  # (tokens,)
    with bench.threshold(float(scores[0]) - MARGIN, model):
        bench.refused(run(model, copy.copy(inputs)), yes)
    with bench.threshold(float(scores.max()) + MARGIN if turns else 2.0, model):
        bench.unchanged(run(model, copy.copy(inputs)), expected, ~yes)
    if not turns:
        return HOLDS
    place = turn(scores)
    assert place is not None, "this answer does not turn"
    with bench.threshold(float(scores[place] + scores[:place].max()) / 2, model):
        found = run(model, copy.copy(inputs))
    assert found[0, :place].tolist() == expected[0, :place].tolist(), "the answer changed before it turned"
    bench.refused(found[:, place:], yes)
    return HOLDS.but(TURNS)


for name, options in Named({"greedy search": {}, "static cache": {"cache_implementation": "static"}}).items():
    row("torch", SECTION, f"every token: {name}", EVERY)(
        lambda bench, options=options: at_each_token(bench, way(**options))
    )

for name, options in Named(
    {
        "no cache": {"use_cache": False},
        "prefill_chunk_size 1": {"prefill_chunk_size": 1},
        "prefill_chunk_size 3": {"prefill_chunk_size": 3},
        "static cache, prefill_chunk_size 3": {"cache_implementation": "static", "prefill_chunk_size": 3},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
    }
).items():
    row("torch", SECTION, f"every token: {name}")(lambda bench, options=options: at_each_token(bench, way(**options)))

for name, options in Named(
    {
        "beam search": {"num_beams": 3},
        "beam search, static cache": {"num_beams": 3, "cache_implementation": "static"},
    }
).items():
    row("torch", SECTION, f"every token: {name}")(
        lambda bench, options=options: at_each_token(bench, way(**options), turns=False)
    )


@row("torch", SECTION, "every token: cache quantized to 4 bits (quanto)")
def quantized(bench: Bench) -> Outcome:
    """The last tokens stay whole, so the prompt's verdict is exact; those of the answer are of a rounded past."""
    quanto_without_a_compiler()
    settings = {"backend": "quanto", "nbits": 4, "q_group_size": 16, "residual_length": 4}
    run = way(cache_implementation="quantized", cache_config=settings)
    return at_each_token(bench, run, turns=False)


@row("torch", SECTION, "every token: assisted by an erring model")
def assisted(bench: Bench) -> Outcome:
    return at_each_token(bench, way(assistant_model=helper(bench, another=True)))


@row("torch", SECTION, "every token: by hand, token by token", ("llava", "qwen2_5_vl"))
def by_hand(bench: Bench) -> Outcome:
    return at_each_token(bench, fed(bench, 1))


@row("torch", SECTION, "every token: static cache of one's own, by hand")
def static_by_hand(bench: Bench) -> Outcome:
    def run(model: Any, inputs: Inputs) -> Tensor:
        loop = ByHand(bench, model)
        loop.cache = cache_of(bench, "static")
        return loop.feed_prompt(inputs, chunks(inputs["input_ids"].shape[1], 4)).say()

    return at_each_token(bench, run)


@row("torch", SECTION, "every token: text without the chat template, by hand, the last token on its own")
def raw_last_token(bench: Bench) -> Outcome:
    return last_token_alone(bench)


@torch.no_grad()
def last_token_alone(bench: Bench) -> Outcome:
    """Raw text whose first piece is allowed, and which is refused for its last token alone."""
    yes = torch.ones(1, dtype=torch.bool)
    for text in TEXTS:
        inputs = bench.raw(text)
        shorter = bench.of_ids(inputs["input_ids"][0, :-1].tolist())
        low, high = (float(bench.guarded.expected(one)) for one in (shorter, inputs))
        if high - low < 4 * MARGIN:
            continue
        with bench.threshold((low + high) / 2):
            loop = ByHand(bench, bench.model).feed_prompt(inputs, [inputs["input_ids"].shape[1] - 1])
            assert loop.probability is not None and loop.probability < (low + high) / 2
            bench.refused(loop.feed(inputs["input_ids"][:, -1:]).say(), yes)
        return Outcome(REFUSED, NOT_ASKED, "refused for its last token alone")
    raise AssertionError("no text of these is unsafe for its last token")


@row("torch", SECTION, "every token: answer, crop into the prompt, answer again")
def cropped(bench: Bench) -> Outcome:
    return answered_twice(bench)


def answered_twice(bench: Bench) -> Outcome:
    def run(model: Any, inputs: Inputs) -> Tensor:
        tokens = inputs["input_ids"].shape[1]
        loop = ByHand(bench, model).feed_prompt(inputs, [tokens])
        loop.say(6)
        loop.crop(tokens - 2)
        return loop.feed(inputs["input_ids"][:, -2:]).say()

    return at_each_token(bench, run)


@row("torch", SECTION, "every token: saved and loaded again")
def saved(bench: Bench) -> Outcome:
    with tempfile.TemporaryDirectory() as scratch:
        bench.model.save_pretrained(scratch)
        model = AutoModelForImageTextToText.from_pretrained(scratch, trust_remote_code=True).eval()
    return at_each_token(bench, way(), model=model)


@row("torch", SECTION, "every token: mixed verdicts in one batch", ("llava", "qwen2_5_vl"))
def mixed(bench: Bench) -> Outcome:
    return side_by_side(bench, way())


@torch.no_grad()
def side_by_side(bench: Bench, run: Way) -> Outcome:
    """Rows that are refused at once beside rows that turn later, or never."""
    prompts = [bench.one(seed=seed) for seed in range(6)]
    inputs = joined(bench, prompts)
    expected = run(bench.stock, copy.copy(inputs))  # (rows, tokens)
    scores = [bench.steps(one, said[None]) for one, said in zip(prompts, expected, strict=True)]  # (tokens,) each
    value = parting(scores)
    with bench.threshold(value):
        found = run(bench.model, copy.copy(inputs))
    yes = torch.ones(1, dtype=torch.bool)
    for said, plain, line in zip(found, expected, scores, strict=True):
        place = int((line >= value).long().argmax()) if (line >= value).any() else len(line)
        bench.unchanged(said[None, :place], plain[None, :place], ~yes)
        if place < len(said):
            bench.refused(said[None, place:], yes)
    return HOLDS.but(TURNS)


def joined(bench: Bench, prompts: list[Inputs]) -> Inputs:
    """Single prompts as a batch, padded on the left."""
    rows = [inputs["input_ids"][0] for inputs in prompts]  # (tokens,) each
    width, pad = max(map(len, rows)), bench.stock.generation_config.pad_token_id
    left = torch.nn.functional.pad
    ids = torch.stack([left(line, (width - len(line), 0), value=pad) for line in rows])  # (rows, tokens)
    mask = torch.stack([left(torch.ones_like(line), (width - len(line), 0)) for line in rows])  # (rows, tokens)
    inputs = {"input_ids": ids, "attention_mask": mask}
    return {**inputs, "token_type_ids": torch.zeros_like(ids)} if bench.guarded.family == "gemma3" else inputs


def parting(scores: list[Tensor]) -> float:
    """A threshold in a gap of all scores that refuses a row at once, another later, and most rows not at once."""
    ordered = torch.cat(scores).sort().values
    for low, high in itertools.pairwise(ordered.tolist()):
        value = (low + high) / 2
        at_once = sum(bool(line[0] >= value) for line in scores)
        later = sum(bool(line[0] < value <= line.max()) for line in scores)
        if high - low > 2 * MARGIN and 0 < at_once <= len(scores) // 2 and later:
            return value
    raise AssertionError("no threshold parts these prompts")
