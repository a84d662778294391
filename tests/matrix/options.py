"""Rows that are options of `generate` alone: picking the next token, caches, drafts."""

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, QuantizedCache, StaticCache

from matrix.bench import Bench, Check, Inputs, Way, generate, generating, on, on_mixed, on_single, on_text, raises
from matrix.rows import FAMILIES, LOUD, NOTHING, TOKENS_OF_IT, enter

Options = dict[str, dict[str, Any]]
SAMPLED = {"do_sample": True, "temperature": 1.5}


def of(options: Options, check: Any = on_mixed, **further: Any) -> dict[str, Check]:
    """A check for each set of options."""
    return {name: check(generating(**one), **further) for name, one in options.items()}


# --------------------------------------------------------------------------------- picking the next token

PICKING = "Picking the next token"
enter(PICKING, of({"greedy search": {}}), on=(*FAMILIES, "smol-llava"))
enter(
    PICKING, of({"sampling at temperature 1.5": SAMPLED, "beam search": {"num_beams": 3}}), on=("llava", "smol-llava")
)
enter(PICKING, of({
    "sampling at temperature 50": {"do_sample": True, "temperature": 50.0},
    "top-k": {"do_sample": True, "top_k": 5},
    "top-p": {"do_sample": True, "top_p": 0.6},
    "min-p": {"do_sample": True, "min_p": 0.2},
    "typical, epsilon and eta cutoffs": {"do_sample": True, "typical_p": 0.3, "epsilon_cutoff": 0.02, "eta_cutoff": 0.02},
    "several answers a prompt (n), sampled": {"do_sample": True, "num_return_sequences": 3},
    "beam search with sampling": {"num_beams": 3, **SAMPLED},
    "beam search that stops early": {"num_beams": 3, "early_stopping": True, "length_penalty": 2.0},
    "repetition_penalty 1.8": {"repetition_penalty": 1.8},
    "encoder_repetition_penalty 1.5": {"encoder_repetition_penalty": 1.5},
    "max_new_tokens 1": {"max_new_tokens": 1},
    "max_new_tokens 3": {"max_new_tokens": 3},
}))  # fmt: skip
enter(
    PICKING,
    {"several answers a prompt (n), from beams": on_mixed(generating(num_beams=4, num_return_sequences=3), best_of=3)},
    remark="the beams of a row differ by construction: the best is the refusal, others are tokens of it",
)
enter(PICKING, {
    "a stop string within the refusal":
        lambda bench: bench.check(generating(stop_strings=[" not"], tokenizer=bench.guarded.processor.tokenizer), [bench.mixed]),
})  # fmt: skip

# ------------------------------------------------------------- options that forbid tokens of the refusal

FORBIDDING = "Options that forbid tokens of the refusal"


def forbidding(refusal: list[int]) -> Options:
    """Options that forbid the token which the refusal wants next; `refusal` are its ids, end of sequence last."""
    longer = {"min_new_tokens": len(refusal) + 4, "max_new_tokens": len(refusal) + 6}
    return {
        "no_repeat_ngram_size 1": {"no_repeat_ngram_size": 1, "max_new_tokens": 8},
        "no_repeat_ngram_size 1, beams, sampled": {
            "no_repeat_ngram_size": 1, "num_beams": 3, "do_sample": True, "max_new_tokens": 6,
        },
        "min_new_tokens": longer,
        "min_new_tokens, beams": {**longer, "num_beams": 3},
        "min_new_tokens, sampled": {**longer, "do_sample": True, "temperature": 2.0},
        "bad_words_ids": {"bad_words_ids": [[refusal[1]], [refusal[3]]]},
        "suppress_tokens": {"suppress_tokens": [refusal[0], refusal[2]]},
        "suppress_tokens, all but one": {"suppress_tokens": refusal[1:]},
        "begin_suppress_tokens": {"begin_suppress_tokens": [refusal[0]]},
        "sequence_bias, against it and for another token": {"sequence_bias": [[[refusal[1]], -50.0], [[70], 50.0]]},
        "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 1.5)},
        "forced_eos_token_id": {"forced_eos_token_id": refusal[-1], "max_new_tokens": 4},
    }  # fmt: skip


def forbidden(name: str) -> Check:
    def check(bench: Bench) -> None:
        bench.check(generating(**forbidding(bench.guarded.refusal)[name]), [bench.mixed], exactly=False)

    return check


enter(FORBIDDING, {name: forbidden(name) for name in forbidding([0] * 9)}, harmful=TOKENS_OF_IT)


def all_forbidden(option: str) -> Check:
    """Where no token of the refusal is left, all refused prompts get one and the same answer: none is the model's."""

    def check(bench: Bench) -> None:
        refusal = bench.guarded.refusal
        value = refusal if option == "suppress_tokens" else [[[token], -2e4] for token in refusal]
        way, inputs = generating(**{option: value}), bench.mixed
        with bench.threshold(1 - 1e-6):
            assert torch.equal(way(bench.model, inputs), way(bench.stock, inputs))
        with bench.threshold(1e-6):
            assert len({tuple(said) for said in way(bench.model, inputs).tolist()}) == 1

    return check


enter(
    FORBIDDING,
    {f"{option}, the whole refusal": all_forbidden(option) for option in ("suppress_tokens", "sequence_bias")},
    harmful=NOTHING,
    remark="all logits of a refused row but the refusal's are one number",
)

# ----------------------------------------------------------------------------------------------- caches

CACHES = "Caches"
enter(CACHES, of({"static cache": {"cache_implementation": "static"}, "no cache": {"use_cache": False}}), on=FAMILIES)
enter(CACHES, of({
    "static cache, beams": {"cache_implementation": "static", "num_beams": 3},
    "static cache, larger than needed": {"cache_implementation": "static", "max_cache_len": 300},
    "no cache, beams": {"use_cache": False, "num_beams": 2},
}))  # fmt: skip
enter(CACHES, of({"static cache, prefill_chunk_size 3": {
    "cache_implementation": "static", "prefill_chunk_size": 3}}, on_text))  # fmt: skip


def quantized(bench: Bench) -> dict[str, Any]:
    """Quanto unpacks 4 bits by C++ that it compiles at first use, in a minute; a line of torch does the same."""
    from optimum.quanto.library.extensions.cpp import ext

    def unpack(packed: Tensor, bits: int) -> Tensor:
        return torch.cat([(packed >> place) & (2**bits - 1) for place in range(0, 8, bits)])

    ext._lib = SimpleNamespace(unpack=unpack)
    return {"backend": "quanto", "nbits": 4, "q_group_size": 16, "residual_length": 4}


enter(CACHES, {
    f"quantized to 4 bits (quanto){', beams' if beams > 1 else ''}": lambda bench, beams=beams: bench.check(
        generating(cache_implementation="quantized", cache_config=quantized(bench), num_beams=beams), [bench.mixed]
    )
    for beams in (1, 2)
}, slow=True)  # fmt: skip


def offloaded(kind: str) -> Check:
    def check(bench: Bench) -> None:
        way = generating(cache_implementation=kind)
        if torch.cuda.is_available():
            return bench.check(way, [bench.mixed])
        for model in (bench.stock, bench.model):  # transformers itself asks for an accelerator
            bench.check_error(lambda _, model=model: way(model, bench.mixed), ".", Exception)

    return check


enter(
    CACHES,
    {f"{kind} cache": offloaded(kind) for kind in ("offloaded", "offloaded_static")},
    remark="without an accelerator both models raise an error",
)


def used_again(kind: type) -> Check:
    def check(bench: Bench) -> None:
        config = bench.stock.config.get_text_config(decoder=True)
        further: dict[str, Any] = {"max_cache_len": 120} if kind is StaticCache else {}
        if kind is QuantizedCache:
            further = quantized(bench)

        def way(model: Any, inputs: Inputs) -> Tensor:
            cache = kind(config=config, **further)
            generate(model, bench.batch(images=True, seed=5), past_key_values=cache)
            cache.reset()
            return generate(model, inputs, past_key_values=cache)

        bench.check(way, [bench.mixed])

    return check


USED = {f"{kind.__name__}, reset for one batch after another": used_again(kind) for kind in (DynamicCache, StaticCache)}
enter(CACHES, USED)
enter(CACHES, {"QuantizedCache, reset for one batch after another": used_again(QuantizedCache)}, slow=True)

# ----------------------------------------------------------------------------------------------- drafts

DRAFTS = "Drafts"


def helper(bench: Bench, *, drafts: int = 5, erring: bool = True) -> Any:
    """A model that drafts: the original, which is always right, or one that errs."""
    model = copy.deepcopy(bench.stock)
    if erring:
        head = model.get_output_embeddings().weight  # (vocabulary, hidden)
        head.data += torch.randn(head.shape, generator=torch.Generator().manual_seed(3)) * 0.1
    model.generation_config.num_assistant_tokens = drafts
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0.0
    return model


def assisted(prompts: Any = None, *, drafts: int = 5, erring: bool = True, **options: Any) -> Check:
    def check(bench: Bench) -> None:
        way = generating(assistant_model=helper(bench, drafts=drafts, erring=erring), **options)
        bench.check(way, prompts(bench) if prompts else bench.singles)

    return check


def looked_up(**options: Any) -> Way:
    return generating(prompt_lookup_num_tokens=3, **options)


enter(DRAFTS, {"assisted by the original model": assisted(erring=False)}, on=("llava", "smol-llava"))
enter(DRAFTS, {
    "assisted by an erring model": assisted(),
    "assisted, one draft at a time": assisted(drafts=1),
    "assisted, max_new_tokens 1": assisted(max_new_tokens=1),
    "assisted, max_new_tokens 2": assisted(erring=False, max_new_tokens=2),
    "assisted, sampled": assisted(**SAMPLED),
    "assisted, text without the chat template": assisted(lambda bench: [bench.raw("please tell me how to cook rice")]),
})  # fmt: skip
enter(DRAFTS, {"assisted, with a picture": assisted(lambda bench: [bench.batch(images=True, count=1)])},
      on=("llava", "qwen2_5_vl"))  # fmt: skip

REPEATED = "please tell me how please tell me how please tell me how please tell me"
enter(DRAFTS, {
    f"prompt lookup, max_new_tokens {tokens}": on(
        lambda bench: [bench.chat(("user", REPEATED))], looked_up(max_new_tokens=tokens)
    )
    for tokens in (1, 2, 14)
})  # fmt: skip
enter(DRAFTS, {"prompt lookup": on_single(looked_up())}, on=("smol-llava",))
enter(DRAFTS, {"prompt lookup, sampled, text without the chat template": on(
    lambda bench: [bench.raw(REPEATED)], looked_up(do_sample=True))})  # fmt: skip

# ---------------------------------------------------------------------- options that would pass the gate by

enter("Options that are refused", {
    "classifier-free guidance": raises(lambda bench, model: generate(model, bench.singles[0], guidance_scale=1.5), "guidance_scale"),
    "assistant_early_exit": raises(
        lambda bench, model: generate(model, bench.singles[0], assistant_early_exit=2), "blocks that judge"),
    "assistant_ensemble_weight": raises(
        lambda bench, model: generate(
            model, bench.singles[0], assistant_model=helper(bench), assistant_ensemble_weight=0.0),
        "unguarded model"),
    "the guarded model drafts for another": raises(
        lambda bench, model: generate(bench.stock, bench.singles[0], assistant_model=model), "does not guard the model"),
    "paged cache": raises(lambda bench, model: generate(model, bench.singles[0], cache_implementation="paged"), "packed"),
    "continuous batching": raises(
        lambda bench, model: model.generate_batch(inputs=bench.batch()["input_ids"].tolist()), "packed"),
}, harmful=LOUD)  # fmt: skip
