"""Several turns on one cache, and caches that are rewound, shared, joined and split."""

import copy
from typing import Any

import torch
from torch import Tensor

from matrix.bench import EVERY, TOKENS, Bench, Inputs, generate
from matrix.by_hand import ByHand, chunks
from matrix.conversation import three_turns
from matrix.outcome import HOLDS, Outcome, row

TURNS = "Turns and rewinds"


@row("torch", TURNS, "three turns on a kept cache, generate", EVERY)
def turns_generated(bench: Bench) -> Outcome:
    turns = three_turns(bench)

    def run(model: Any) -> list[Tensor]:
        ids: list[int] = []
        cache, answers = None, []
        for words in turns.words:
            ids += words
            kept = model.generate(
                **bench.of_ids(ids), past_key_values=cache, max_new_tokens=TOKENS, return_dict_in_generate=True
            )
            cache = kept.past_key_values
            answers.append(kept.sequences[:, len(ids) :])  # (1, tokens)
            ids = kept.sequences[0].tolist()
        return answers

    return turns.compare(run)


for size in (1, None):
    pieces = "token by token" if size else "a turn a call"

    @row("torch", TURNS, f"three turns on a kept cache, by hand, {pieces}", EVERY)
    def turns_by_hand(bench: Bench, size: int | None = size) -> Outcome:
        turns = three_turns(bench)

        def run(model: Any) -> list[Tensor]:
            loop, answers = ByHand(bench, model), []
            for words in turns.words:
                start = 0
                for end in chunks(len(words), size or len(words)):
                    loop.feed(torch.tensor([words[start:end]]))
                    start = end
                answers.append(loop.say(stop=bench.stops))
            return answers

        return turns.compare(run)


@row("torch", TURNS, "three turns without a cache, whole each time", EVERY)
def turns_without_cache(bench: Bench) -> Outcome:
    turns = three_turns(bench)

    def run(model: Any) -> list[Tensor]:
        ids: list[int] = []
        answers = []
        for words in turns.words:
            ids += words
            answers.append(generate(model, bench.of_ids(ids), use_cache=False))
            ids += answers[-1][0].tolist()
        return answers

    return turns.compare(run)


def told_apart(bench: Bench, count: int = 6) -> tuple[Inputs, Inputs, float]:
    """The least and the most unsafe of a few prompts, and a threshold between them."""
    prompts = [bench.one(seed=seed) for seed in range(count)]
    ranked = sorted(prompts, key=lambda inputs: float(bench.guarded.expected(inputs)))
    low, high = (float(bench.guarded.expected(inputs)) for inputs in (ranked[0], ranked[-1]))
    assert high - low > 0.01
    return ranked[0], ranked[-1], (low + high) / 2


def common(one: Inputs, other: Inputs) -> int:
    """How many tokens two prompts share at their beginning, at least one."""
    width = min(one["input_ids"].shape[1], other["input_ids"].shape[1])
    same = (one["input_ids"][0, :width] == other["input_ids"][0, :width]).long().cumprod(-1)  # (width,)
    assert same[0] == 1
    return int(same.sum())


@row("torch", TURNS, "a prefix cached once, for a safe and a harmful prompt")
def shared_prefix(bench: Bench) -> Outcome:
    safe, unsafe, threshold = told_apart(bench)
    shared = common(safe, unsafe)
    yes = torch.ones(1, dtype=torch.bool)
    expected = generate(bench.stock, safe)
    with bench.threshold(threshold):
        prefix = bench.model(input_ids=safe["input_ids"][:, :shared], use_cache=True).past_key_values
        found = [generate(bench.model, one, past_key_values=copy.deepcopy(prefix)) for one in (safe, unsafe, safe)]
    bench.unchanged(found[0], expected, ~yes)
    bench.refused(found[1], yes)
    bench.unchanged(found[2], expected, ~yes)
    return HOLDS


@row("torch", TURNS, "a prefix cached while it was refused itself, for both prompts")
def shared_refused_prefix(bench: Bench) -> Outcome:
    safe, unsafe, threshold = told_apart(bench)
    shared = common(safe, unsafe)
    yes = torch.ones(1, dtype=torch.bool)
    expected = generate(bench.stock, safe)
    with bench.threshold(1e-6):
        prefix = bench.model(input_ids=safe["input_ids"][:, :shared], use_cache=True).past_key_values
    with bench.threshold(threshold):
        found = [generate(bench.model, one, past_key_values=copy.deepcopy(prefix)) for one in (safe, unsafe)]
    bench.unchanged(found[0], expected, ~yes)
    bench.refused(found[1], yes)
    return HOLDS


@row("torch", TURNS, "crop to the shared prefix and on with another prompt, generate")
def rewound(bench: Bench) -> Outcome:
    safe, unsafe, threshold = told_apart(bench)
    shared = common(safe, unsafe)
    yes = torch.ones(1, dtype=torch.bool)
    expected = generate(bench.stock, safe)
    with bench.threshold(threshold):
        cache = None
        for inputs, refused in ((safe, False), (unsafe, True), (safe, False), (unsafe, True)):
            kept = bench.model.generate(
                **inputs, past_key_values=cache, max_new_tokens=TOKENS, return_dict_in_generate=True
            )
            said = kept.sequences[:, inputs["input_ids"].shape[1] :]
            bench.refused(said, yes) if refused else bench.unchanged(said, expected, ~yes)
            cache = kept.past_key_values
            cache.crop(shared - cache.get_seq_length())
    return HOLDS


def regenerated(bench: Bench, back: int) -> Outcome:
    """Answer, go back into the prompt by some tokens, and answer again."""

    def run(model: Any, inputs: Inputs) -> Tensor:
        tokens = inputs["input_ids"].shape[1]
        loop = ByHand(bench, model).feed_prompt(inputs, [tokens])
        loop.say(4)
        loop.crop(tokens - back)
        loop.feed(inputs["input_ids"][:, tokens - back :])
        return loop.say()

    return bench.both_verdicts(run, bench.one())


for back in (1, 2, 5):
    row("torch", TURNS, f"answer, crop {back} tokens into the prompt, feed them again, answer again")(
        lambda bench, back=back: regenerated(bench, back)
    )


@row("torch", TURNS, "crop to nothing and begin anew")
def emptied(bench: Bench) -> Outcome:
    def run(model: Any, inputs: Inputs) -> Tensor:
        loop = ByHand(bench, model).feed(torch.tensor([[70, 71, 72, 73]]))
        loop.crop(0)
        return loop.feed(inputs["input_ids"]).say()

    return bench.both_verdicts(run, bench.one())


@row("torch", TURNS, "rewind into a refusal and on with words of one's own")
def into_the_refusal(bench: Bench) -> Outcome:
    def run(model: Any, inputs: Inputs) -> Tensor:
        tokens = inputs["input_ids"].shape[1]
        loop = ByHand(bench, model).feed_prompt(inputs, [tokens])
        loop.say(6)
        loop.crop(tokens + 3)
        loop.feed(torch.tensor([[70]]))
        return loop.say()

    return bench.both_verdicts(run, bench.one(), exactly=False)


def behind(bench: Bench, inputs: Inputs, tail: list[int]) -> Outcome:
    """Feed a prompt and more in one call, go back behind the prompt, and answer it by the logits that it left."""
    end = inputs["input_ids"].shape[1]
    whole = bench.of_ids([*inputs["input_ids"][0].tolist(), *tail])

    def run(model: Any, _: Inputs) -> Tensor:
        loop = ByHand(bench, model)
        logits = loop.all_logits(**whole)  # (1, tokens, vocabulary)
        loop.crop(end)
        said = logits[:, end - 1].argmax(-1, keepdim=True)  # (1, 1)
        return torch.cat([said, loop.feed(said).say(TOKENS - 1)], dim=1)

    return bench.both_verdicts(run, inputs)


@row("torch", TURNS, "a whole conversation in one call, then back behind its first prompt")
def behind_the_first_prompt(bench: Bench) -> Outcome:
    turns = three_turns(bench)
    return behind(bench, bench.of_ids(turns.words[0]), [70, *turns.words[1]])


@row("torch", TURNS, "caches of two prompts joined into one batch, padded by zeros", EVERY)
def joined(bench: Bench) -> Outcome:
    prompts = [bench.one(seed=seed) for seed in range(4)]
    scores = torch.cat([bench.guarded.expected(inputs) for inputs in prompts])  # (rows,)
    longest = max(inputs["input_ids"].shape[1] for inputs in prompts)

    def run(model: Any, _: Inputs) -> Tensor:
        loops = [ByHand(bench, model).feed_prompt(one, [one["input_ids"].shape[1]]) for one in prompts]
        batch = ByHand(bench, model)
        batch.cache = loops[0].cache
        for layers in zip(*(loop.cache.layers for loop in loops), strict=True):
            for name in ("keys", "values"):
                kept = [getattr(layer, name) for layer in layers]  # (1, heads, tokens, size) each
                width = max(tensor.shape[2] for tensor in kept)
                padded = [torch.nn.functional.pad(one, (0, 0, width - one.shape[2], 0)) for one in kept]
                setattr(layers[0], name, torch.cat(padded))
            if hasattr(layers[0], "cumulative_length"):
                layers[0].cumulative_length = longest
        masks = [loop.mask for loop in loops if loop.mask is not None]  # (1, tokens) each
        batch.mask = torch.cat([torch.nn.functional.pad(mask, (longest - mask.shape[1], 0)) for mask in masks])
        batch.types = torch.zeros_like(batch.mask)
        batch.next = torch.cat([loop.next for loop in loops if loop.next is not None], dim=-2)
        batch.logits = torch.cat([loop.logits for loop in loops])
        return batch.say()

    return bench.mixed_verdicts(run, {}, scores=scores)


@row("torch", TURNS, "rows of a batch picked and repeated after the prompt")
def picked_rows(bench: Bench) -> Outcome:
    rows = torch.tensor([2, 0, 0, 3, 1])

    def run(model: Any, inputs: Inputs) -> Tensor:
        loop = ByHand(bench, model).feed_prompt(inputs, [inputs["input_ids"].shape[1]])
        return loop.pick(rows).say()

    return bench.mixed_verdicts(run, scores=bench.guarded.expected(bench.mixed)[rows])
