"""Ways to bring a prompt in: in chunks, by hand, as embeddings, over turns, on a shared prefix, after a rewind."""

from typing import Any

import torch
from torch import Tensor

from matrix.bench import EVERY, TOKENS, Bench, Inputs, way
from matrix.by_hand import ByHand, fed
from matrix.outcome import HOLDS, Outcome, row

SECTION = "How a prompt is fed"

for size in (1, 2, 3, 7):
    row("torch", SECTION, f"prefill_chunk_size {size}", EVERY)(
        lambda bench, size=size: bench.mixed_verdicts(way(prefill_chunk_size=size), bench.batch(images=False))
    )
    row("torch", SECTION, f"chunks of {size} by hand, pictures in the first", EVERY)(
        lambda bench, size=size: bench.mixed_verdicts(fed(bench, size))
    )


for size in (3, 7):
    row("torch", SECTION, f"prefill_chunk_size {size} with pictures", EVERY)(
        lambda bench, size=size: bench.mixed_verdicts(way(prefill_chunk_size=size))
    )


@row("torch", SECTION, "a loop of one's own, whole prompt", EVERY)
def own_loop(bench: Bench) -> Outcome:
    return bench.mixed_verdicts(fed(bench))


@row("torch", SECTION, "a loop of one's own without a cache", EVERY)
def own_loop_without_cache(bench: Bench) -> Outcome:
    def run(model: Any, inputs: Inputs) -> Tensor:
        start = inputs["input_ids"].shape[1]
        for _ in range(len(bench.guarded.refusal)):
            token = model(**inputs, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)  # (rows, 1)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], token], dim=1)
            inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(token)], dim=1)
            for name in ("token_type_ids", "mm_token_type_ids"):
                if name in inputs:
                    inputs[name] = torch.cat([inputs[name], torch.zeros_like(token)], dim=1)
        return inputs["input_ids"][:, start:]

    return bench.mixed_verdicts(run)


@row("torch", SECTION, "a loop of one's own that runs on behind the end")
def beyond_the_end(bench: Bench) -> Outcome:
    def run(model: Any, inputs: Inputs) -> Tensor:
        return ByHand(bench, model).feed_prompt(inputs, [inputs["input_ids"].shape[1]]).say(2 * TOKENS)

    return bench.mixed_verdicts(run)


@row("torch", SECTION, "generate with inputs_embeds", ("llava", "qwen2_5_vl"))
def embeddings(bench: Bench) -> Outcome:
    inputs = bench.batch(images=False)
    return bench.mixed_verdicts(way(), embedded(bench, inputs), scores=bench.guarded.expected(inputs))


@row("torch", SECTION, "generate with inputs_embeds in chunks of 2")
def embeddings_in_chunks(bench: Bench) -> Outcome:
    inputs = embedded(bench, bench.batch(images=False))
    errors = (RuntimeError, ValueError)  # the guarded model sees first that the mask is cut to no columns
    return bench.like_stock(way(prefill_chunk_size=2), inputs, "size of tensor|0 columns", kind=errors)


@row("torch", SECTION, "generate with inputs_embeds, no cache")
def embeddings_without_cache(bench: Bench) -> Outcome:
    inputs = bench.batch(images=False)
    return bench.mixed_verdicts(way(use_cache=False), embedded(bench, inputs), scores=bench.guarded.expected(inputs))


@row("torch", SECTION, "generate with inputs_embeds of a merged picture")
def embedded_picture(bench: Bench) -> Outcome:
    inputs = bench.mixed
    embeds = bench.stock.get_input_embeddings()(inputs["input_ids"])  # (rows, tokens, hidden)
    features = torch.cat(bench.stock.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output)
    places = inputs["input_ids"] == bench.model.config.image_token_index  # (rows, tokens)
    merged = {"inputs_embeds": embeds.masked_scatter(places[..., None], features)}
    merged["attention_mask"] = inputs["attention_mask"]
    return bench.mixed_verdicts(way(), merged, scores=bench.guarded.expected(inputs))


@row("torch", SECTION, "embeddings by hand, prompt and answer, in pieces of 1", EVERY)
def embeddings_by_hand(bench: Bench) -> Outcome:
    return bench.mixed_verdicts(fed(bench, 1, embedded=True), bench.batch(images=False))


@row("torch", SECTION, "a loop of one's own that calls generate for each token, text and answer whole")
def stateless(bench: Bench) -> Outcome:
    def run(model: Any, inputs: Inputs) -> Tensor:
        start = inputs["input_ids"].shape[1]
        for _ in range(TOKENS):
            sequences = model.generate(**inputs, max_new_tokens=1)  # (1, tokens + 1)
            inputs = bench.of_ids(sequences[0].tolist())
            if sequences[0, -1].item() in bench.stops:
                break
        return inputs["input_ids"][:, start:]

    return bench.both_verdicts(run, bench.one())


@row("torch", SECTION, "an answer that is paused and goes on, on its cache", EVERY)
def paused(bench: Bench) -> Outcome:
    def run(model: Any, inputs: Inputs) -> Tensor:
        start = inputs["input_ids"].shape[1]
        kept = model.generate(**inputs, max_new_tokens=5, return_dict_in_generate=True)
        more = bench.of_ids(kept.sequences[0].tolist())
        return model.generate(**more, past_key_values=kept.past_key_values, max_new_tokens=TOKENS - 5)[:, start:]

    return bench.both_verdicts(run, bench.one())


@row("torch", SECTION, "foreign words fed in place of the refusal")
def foreign_words(bench: Bench) -> Outcome:
    def run(model: Any, inputs: Inputs) -> Tensor:
        loop = ByHand(bench, model).feed_prompt(inputs, [inputs["input_ids"].shape[1]])
        for token in (70, 71, 72):  # one at a time, as a sampler of one's own would
            loop.feed(torch.tensor([[token]]))
        loop.feed(torch.tensor([[73, 74]]))  # and at once, as a draft is fed
        return loop.say()

    bench.both_verdicts(run, bench.one(), exactly=False)
    return HOLDS.but("the refusal goes on from where it would have been")


def embedded(bench: Bench, inputs: Inputs) -> Inputs:
    """A text prompt as embeddings."""
    embeds = bench.stock.get_input_embeddings()(inputs["input_ids"])  # (rows, tokens, hidden)
    return {"inputs_embeds": embeds.detach(), "attention_mask": inputs["attention_mask"]}
