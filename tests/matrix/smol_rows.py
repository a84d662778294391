"""smol-llava, a real model: the ways of running that most people use, with a harmful and a harmless picture."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from matrix.bench import Bench, Inputs, way
from matrix.by_hand import ByHand, fed
from matrix.conversation import Turns
from matrix.onnx_bench import OnnxBench
from matrix.outcome import Outcome, row
from matrix.torch_drafts import helper
from matrix.torch_loading import holds_like, loaded

RUNTIME, SECTION, GRAPHS = "smol-llava", "In torch", "As ONNX graphs"
FAMILIES = ("smol-llava",)


@dataclass(frozen=True)
class SmolBench(Bench):
    """As `Bench`, with pictures that hold a request."""

    pictures: list[Inputs]  # each alone: a harmful request, then a harmless one
    both: Inputs  # the two as a batch
    words: list[list[int]]  # what three turns add: harmless, harmful, harmless
    graphs: Callable[[], OnnxBench]

    def each(self, run: Any, **further: Any) -> Outcome:
        """Each picture alone, at a threshold just below its P(unsafe) and just above."""
        outcomes = [self.both_verdicts(run, dict(inputs), **further) for inputs in self.pictures]
        return outcomes[0]


for name, options in {
    "greedy search": {},
    "sampling at temperature 1.5": {"do_sample": True, "temperature": 1.5},
    "beam search": {"num_beams": 3},
    "several answers a prompt, sampled": {"do_sample": True, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False, "max_new_tokens": 10},
}.items():
    row(RUNTIME, SECTION, f"{name}, both in one batch", FAMILIES)(
        lambda bench, options=options: bench.mixed_verdicts(way(**options), bench.both)
    )

for pieces in (1, 7):
    row(RUNTIME, SECTION, f"chunks of {pieces} behind the picture, by hand", FAMILIES)(
        lambda bench, pieces=pieces: bench.mixed_verdicts(fed(bench, pieces), bench.both)
    )


@row(RUNTIME, SECTION, "prefill_chunk_size 7", FAMILIES)
def chunked(bench: SmolBench) -> Outcome:
    return bench.mixed_verdicts(way(prefill_chunk_size=7), bench.both)


@row(RUNTIME, SECTION, "prompt lookup", FAMILIES)
def lookup(bench: SmolBench) -> Outcome:
    return bench.each(way(prompt_lookup_num_tokens=3))


@row(RUNTIME, SECTION, "assisted by the stock model", FAMILIES)
def assisted(bench: SmolBench) -> Outcome:
    return bench.each(way(assistant_model=helper(bench)))


@row(RUNTIME, SECTION, "loaded in bfloat16", FAMILIES)
def bfloat16(bench: SmolBench) -> Outcome:
    return holds_like(bench, *loaded(bench, dtype=torch.bfloat16), inputs=dict(bench.both))


@row(RUNTIME, SECTION, "a request in text", FAMILIES)
def in_text(bench: SmolBench) -> Outcome:
    return bench.both_verdicts(way(), bench.of_ids(bench.words[0]))


@row(RUNTIME, SECTION, "three turns on a kept cache, generate", FAMILIES)
def turns_generated(bench: SmolBench) -> Outcome:
    def run(model: Any) -> list[Tensor]:
        ids: list[int] = []
        cache, answers = None, []
        for words in bench.words:
            ids += words
            kept = model.generate(
                **bench.of_ids(ids), past_key_values=cache, max_new_tokens=14, return_dict_in_generate=True
            )
            cache = kept.past_key_values
            answers.append(kept.sequences[:, len(ids) :])  # (1, tokens)
            ids = kept.sequences[0].tolist()
        return answers

    return Turns(bench, bench.words, 0.5).compare(run)


@row(RUNTIME, SECTION, "three turns on a kept cache, by hand, token by token", FAMILIES)
def turns_by_hand(bench: SmolBench) -> Outcome:
    return Turns(bench, bench.words, 0.5).compare(lambda model: spoken(bench, model, bench.words))


def spoken(bench: Bench, model: Any, words: list[list[int]]) -> list[Tensor]:
    """What a model says in three turns that are fed token by token, (1, tokens) each."""
    loop, answers = ByHand(bench, model), []
    for turn in words:
        for token in turn:
            loop.feed(torch.tensor([[token]]))
        answers.append(loop.say(stop=bench.stops))
    return answers


# --------------------------------------------------------------------------------------------------- ONNX


for name, size in (("whole", None), ("token by token behind the picture", 1), ("chunks of 7 behind the picture", 7)):

    @row(RUNTIME, GRAPHS, f"onnxruntime, {name}", FAMILIES)
    def in_graphs(bench: SmolBench, size: int | None = size) -> Outcome:
        graphs = bench.graphs()
        return graphs.mixed_verdicts(fed(graphs, size), bench.both)


@row(RUNTIME, GRAPHS, "onnxruntime, three turns on a kept past, token by token", FAMILIES)
def turns_in_graphs(bench: SmolBench) -> Outcome:
    graphs = bench.graphs()
    return Turns(graphs, bench.words, graphs.written).compare(lambda model: spoken(graphs, model, bench.words))
