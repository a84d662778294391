"""onnxruntime: ways to pick tokens, to feed a prompt, to keep and change the past, and kinds of prompt."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException
from torch import Tensor

from matrix.bench import EVERY, MARGIN, TOKENS, Inputs
from matrix.by_hand import ByHand, fed, whole
from matrix.conversation import three_turns
from matrix.onnx_bench import OnnxBench
from matrix.outcome import CLOSED, LOUD, NOT_ASKED, REFUSED, Outcome, row
from matrix.torch_prompts import LIKE_AN_ANSWER, TEXT, pictures
from matrix.torch_turns import common

RUNTIME = "onnxruntime"
Array = NDArray[Any]
PICKING, FEEDING, PAST, PROMPTS = "Picking the next token", "How a prompt is fed", "The past", "Kinds of prompt"

# ------------------------------------------------------------------------------------ picking the next token


@row(RUNTIME, PICKING, "greedy search", EVERY)
def greedy(bench: OnnxBench) -> Outcome:
    return bench.mixed_verdicts(fed(bench), bench.batch(count=6))


for name, temperature, kept in (
    ("sampling at temperature 1.5", 1.5, None), ("sampling at temperature 50", 50.0, None), ("top-k", 1.0, 5),
):  # fmt: skip

    @row(RUNTIME, PICKING, name)
    def sampled(bench: OnnxBench, temperature: float = temperature, kept: int | None = kept) -> Outcome:
        def run(model: Any, inputs: Inputs) -> Tensor:
            draw = torch.Generator().manual_seed(0)
            loop, said = whole(bench, model, inputs), []
            for _ in range(TOKENS):
                logits = loop.logits / temperature  # (rows, vocabulary)
                if kept is not None:
                    lowest = logits.topk(kept).values[:, -1:]  # (rows, 1)
                    logits = logits.masked_fill(logits < lowest, -torch.inf)
                said.append(torch.multinomial(logits.softmax(-1), 1, generator=draw))  # (rows, 1)
                loop.feed(said[-1])
            return torch.cat(said, dim=1)

        return bench.mixed_verdicts(run, bench.batch(count=6))


@row(RUNTIME, PICKING, "beams, by reordering the past")
def beams(bench: OnnxBench) -> Outcome:
    width = 3

    def run(model: Any, inputs: Inputs) -> Tensor:
        loop = whole(bench, model, inputs)
        score, said = loop.logits.log_softmax(-1)[0].topk(width)  # (width,), (width,)
        loop.pick(torch.zeros(width, dtype=torch.int64))
        paths = said[:, None]  # (width, tokens)
        for _ in range(TOKENS - 1):
            loop.feed(paths[:, -1:])
            total = score[:, None] + loop.logits.log_softmax(-1)  # (width, vocabulary)
            score, best = total.flatten().topk(width)  # (width,)
            parents = best // total.shape[1]
            loop.pick(parents)
            paths = torch.cat([paths[parents], (best % total.shape[1])[:, None]], dim=1)
        return paths[score.argmax()][None]

    return bench.each(run, bench.ones())


# ------------------------------------------------------------------------------------------------- feeding

for size in (1, 2, 3, 7):
    row(RUNTIME, FEEDING, f"chunks of {size}, pictures in the first", EVERY)(
        lambda bench, size=size: bench.mixed_verdicts(fed(bench, size), bench.batch(count=6))
    )


@row(RUNTIME, FEEDING, "three turns on a kept past, a turn a call", EVERY)
def turns(bench: OnnxBench) -> Outcome:
    return conversation(bench, None)


@row(RUNTIME, FEEDING, "three turns on a kept past, token by token", EVERY)
def turns_in_tokens(bench: OnnxBench) -> Outcome:
    return conversation(bench, 1)


def conversation(bench: OnnxBench, size: int | None) -> Outcome:
    chosen = three_turns(bench)

    def run(model: Any) -> list[Tensor]:
        loop, answers = ByHand(bench, model), []
        for words in chosen.words:
            for piece in torch.tensor([words]).split(size or len(words), dim=1):
                loop.feed(piece)
            answers.append(loop.say(stop=bench.stops))
        return answers

    return chosen.compare(run)


# ------------------------------------------------------------------------------------------------ the past


def regenerated(bench: OnnxBench, back: int) -> Outcome:
    """Answer, cut the past some tokens before the prompt's end, and answer again."""

    def run(model: Any, inputs: Inputs) -> Tensor:
        tokens = inputs["input_ids"].shape[1]
        loop = whole(bench, model, inputs)
        loop.say(4)
        loop.crop(tokens - back)
        return loop.feed(inputs["input_ids"][:, tokens - back :]).say()

    return bench.each(run, bench.ones())


for back in (1, 2, 5):
    row(RUNTIME, PAST, f"cut {back} tokens before the prompt's end, and on")(
        lambda bench, back=back: regenerated(bench, back)
    )


@row(RUNTIME, PAST, "cut to nothing, and another prompt")
def emptied(bench: OnnxBench) -> Outcome:
    safe, unsafe = bench.told_apart(bench.ones())

    def run(model: Any, inputs: Inputs) -> Tensor:
        loop = whole(bench, model, unsafe if inputs is safe else safe)
        loop.say(3)
        loop.crop(0)
        return loop.feed(inputs["input_ids"]).say()

    return bench.each(run, [safe, unsafe])


@row(RUNTIME, PAST, "cut into the refusal, and on with words of one's own")
def into_the_refusal(bench: OnnxBench) -> Outcome:
    _, unsafe = bench.told_apart(bench.ones())
    loop = whole(bench, bench.graphs, unsafe)
    loop.say(6)
    loop.crop(unsafe["input_ids"].shape[1] + 3)
    loop.feed(torch.tensor([[70]]))
    bench.refused(loop.say(), torch.ones(1, dtype=torch.bool), exactly=False)
    return Outcome(REFUSED, NOT_ASKED, "the refusal goes on")


@row(RUNTIME, PAST, "a prefix kept once, for an allowed and a refused prompt")
def shared(bench: OnnxBench) -> Outcome:
    safe, unsafe = bench.told_apart(bench.ones())
    width = common(safe, unsafe)

    def run(model: Any, inputs: Inputs) -> Tensor:
        loop = ByHand(bench, model).feed(inputs["input_ids"][:, :width])
        twin = copy.copy(loop)
        twin.cache = copy.deepcopy(loop.cache)
        loop.feed((unsafe if inputs is safe else safe)["input_ids"][:, width:]).say(3)
        return twin.feed(inputs["input_ids"][:, width:]).say()

    return bench.each(run, [safe, unsafe])


@row(RUNTIME, PAST, "rows of a batch picked and repeated after the prompt")
def picked(bench: OnnxBench) -> Outcome:
    rows = torch.tensor([2, 0, 0, 5, 1, 3, 4])

    def run(model: Any, inputs: Inputs) -> Tensor:
        return whole(bench, model, inputs).pick(rows).say()

    inputs = bench.batch(count=6)
    return bench.mixed_verdicts(run, inputs, scores=bench.guarded.expected(inputs)[rows])


def of_unequal_lengths(bench: OnnxBench, cut: Callable[[bool, Array], Array]) -> Outcome:
    """A past whose decoder's and ledger's layers were cut differently, and the end of a prompt.

    A graph cannot raise an error of its own: all rows are refused, unless onnxruntime finds that the shapes do not fit.

    Args:
        cut: given whether a layer is the ledger's, and its array (rows, heads, tokens, size).
    """
    inputs = bench.batch(count=6)
    loop = ByHand(bench, bench.graphs)
    loop.feed_prompt(inputs, [inputs["input_ids"].shape[1] - 3])
    blocks = bench.stock.config.get_text_config().num_hidden_layers
    arrays = loop.cache.arrays
    for name, array in arrays.items():
        arrays[name] = cut(int(name.split(".")[1]) >= blocks, array)
    if loop.mask is not None:
        loop.mask = loop.mask[:, : arrays["past_key_values.0.key"].shape[2]]
    try:
        said = loop.feed(inputs["input_ids"][:, -3:]).say()
    except (Fail, InvalidArgument, RuntimeException):
        return Outcome(LOUD, LOUD, "onnxruntime raises an error, since the lengths do not fit")
    bench.refused(said, torch.ones(6, dtype=torch.bool))
    return Outcome(REFUSED, CLOSED, "a graph cannot raise an error, so it refuses")


@row(RUNTIME, PAST, "a past without its ledger")
def without_ledger(bench: OnnxBench) -> Outcome:
    """As a plain export of the same model would leave it."""
    return of_unequal_lengths(bench, lambda ledger, array: array[:, :, :0] if ledger else array)


@row(RUNTIME, PAST, "a past whose decoder's layers alone were cut")
def ledger_too_long(bench: OnnxBench) -> Outcome:
    return of_unequal_lengths(bench, lambda ledger, array: array if ledger else array[:, :, :-2])


@row(RUNTIME, PAST, "a past whose ledger alone was cut")
def ledger_too_short(bench: OnnxBench) -> Outcome:
    return of_unequal_lengths(bench, lambda ledger, array: array[:, :, :-2] if ledger else array)


@row(RUNTIME, PAST, "a past handed from one session to another")
def handed_over(bench: OnnxBench) -> Outcome:
    def run(model: Any, inputs: Inputs) -> Tensor:
        loop = whole(bench, model, inputs)
        loop.model = bench.another() if model is bench.graphs else model
        return loop.say()

    return bench.mixed_verdicts(run, bench.batch(count=6))


# ---------------------------------------------------------------------------------------- kinds of prompt

for side in ("left", "right"):
    row(RUNTIME, PROMPTS, f"mixed verdicts in one batch, padding on the {side}", EVERY)(
        lambda bench, side=side: bench.mixed_verdicts(fed(bench), bench.batch(count=6, side=side))
    )

TEXTS = [f"{TEXT} {more}" for more in ("", "and rain", "for us", "when the dog ran", "under a red house", "why")]


@row(RUNTIME, PROMPTS, "text without the chat template, whole", EVERY)
def raw(bench: OnnxBench) -> Outcome:
    return bench.each(fed(bench), [bench.raw(text) for text in TEXTS])


@row(RUNTIME, PROMPTS, "text without the chat template, the last two tokens on their own")
def raw_in_pieces(bench: OnnxBench) -> Outcome:
    def run(model: Any, inputs: Inputs) -> Tensor:
        tokens = inputs["input_ids"].shape[1]
        return ByHand(bench, model).feed_prompt(inputs, [tokens - 2, tokens]).say()

    return bench.each(run, [bench.raw(text) for text in TEXTS])


@row(RUNTIME, PROMPTS, "text without the chat template, token by token", EVERY)
def raw_token_by_token(bench: OnnxBench) -> Outcome:
    run = fed(bench, 1)
    scores = [(inputs, bench.steps(inputs, run(bench.stock, inputs))) for inputs in map(bench.raw, TEXTS)]
    allowed = [inputs for inputs, steps in scores if steps.max() < bench.written - MARGIN]
    refused = [inputs for inputs, steps in scores if steps[0] > bench.written + MARGIN]
    return bench.each(run, allowed[:1] + refused[:1]).but(LIKE_AN_ANSWER)


@row(RUNTIME, PROMPTS, "the beginning of sequence alone")
def nothing(bench: OnnxBench) -> Outcome:
    return bench.each(fed(bench), [bench.of_ids([bench.tokenizer.bos_token_id])]).but(LIKE_AN_ANSWER)


@row(RUNTIME, PROMPTS, "a picture alone", EVERY)
def picture_alone(bench: OnnxBench) -> Outcome:
    return bench.each(fed(bench), [pictures(bench, 1, seed=seed) for seed in range(10)])


@row(RUNTIME, PROMPTS, "three pictures and text", EVERY)
def several_pictures(bench: OnnxBench) -> Outcome:
    texts = ("what is in these", "tell me where", "why", "list ideas", "the small dog", "is it red", "please", "how")
    return bench.each(fed(bench), [pictures(bench, 3, text, seed=len(text)) for text in texts])


@row(RUNTIME, PROMPTS, "embeddings of one's own, token by token")
def embedded(bench: OnnxBench) -> Outcome:
    return bench.each(fed(bench, 1, embedded=True), bench.ones())
