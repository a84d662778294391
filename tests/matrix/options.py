"""Rows that are options of `generate`: picking the next token, caches, drafts."""

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from matrix.bench import Bench, Inputs, Way, generate, generating, mixed_text, single
from matrix.rows import LLAVA, NOTHING, REST, SMOL, THREE, TOKENS_OF_IT, enter, enter_checks

SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 1.5}

PICKING = "Picking the next token"
enter(PICKING, {"greedy search": {}}, on=(*THREE, *REST, *SMOL))
enter(PICKING, {"sampling at temperature 1.5": SAMPLED, "beam search": {"num_beams": 3}}, on=(*THREE, *SMOL))
CHOICES: dict[str, dict[str, Any]] = {
    "sampling at temperature 50": {"do_sample": True, "temperature": 50.0},
    "top-k": {"do_sample": True, "top_k": 5},
    "top-p": {"do_sample": True, "top_p": 0.6},
    "min-p": {"do_sample": True, "min_p": 0.2},
    "typical and epsilon cutoffs": {"do_sample": True, "typical_p": 0.3, "epsilon_cutoff": 0.02},
    "several answers a prompt (n), sampled": {"do_sample": True, "num_return_sequences": 3},
    "beam search with sampling": {"num_beams": 3, **SAMPLED},
    "beam search that stops early": {"num_beams": 3, "early_stopping": True, "length_penalty": 2.0},
    "repetition_penalty 1.8": {"repetition_penalty": 1.8},
    "encoder_repetition_penalty 1.5": {"encoder_repetition_penalty": 1.5},
    "max_new_tokens 1": {"max_new_tokens": 1},
    "max_new_tokens 3": {"max_new_tokens": 3},
}
enter(PICKING, CHOICES)
BEAMS = {"several answers a prompt (n), from beams": {"num_beams": 4, "num_return_sequences": 3}}
enter(PICKING, BEAMS, harmful=TOKENS_OF_IT, remark="the beams of a row differ by construction")

# ----------------------------------------------------------------- options that forbid tokens of the refusal

FORBIDDING = "Options that forbid tokens of the refusal"


def forbidding(refusal: list[int], tokenizer: Any = None) -> dict[str, dict[str, Any]]:
    """Options that forbid what the refusal wants next, or end it; `refusal` are its ids, end of sequence last."""
    longer = {"min_new_tokens": len(refusal) + 4, "max_new_tokens": len(refusal) + 6}
    once = {"no_repeat_ngram_size": 1, "max_new_tokens": 8}
    return {
        "no_repeat_ngram_size 1": once,
        "no_repeat_ngram_size 1, beams, sampled": {**once, "num_beams": 3, "do_sample": True},
        "min_new_tokens": longer,
        "min_new_tokens, beams": {**longer, "num_beams": 3},
        "min_new_tokens, sampled": {**longer, "do_sample": True, "temperature": 2.0},
        "bad_words_ids": {"bad_words_ids": [[refusal[1]], [refusal[3]]]},
        "suppress_tokens": {"suppress_tokens": [refusal[0], refusal[2]]},
        "suppress_tokens, all but one": {"suppress_tokens": refusal[1:]},
        "begin_suppress_tokens": {"begin_suppress_tokens": [refusal[0]]},
        "sequence_bias against it, and for another token": {"sequence_bias": [[[refusal[1]], -50.0], [[70], 50.0]]},
        "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 1.5)},
        "a stop string within the refusal": {"stop_strings": [" not"], "tokenizer": tokenizer},
        "forced_eos_token_id": {"forced_eos_token_id": refusal[-1], "max_new_tokens": 4},
    }


def forbidden(name: str) -> Way:
    def way(bench: Bench, model: Any, inputs: Inputs) -> Tensor:
        return generate(model, inputs, **forbidding(bench.guarded.refusal, bench.tokenizer)[name])

    return way


enter(FORBIDDING, {name: forbidden(name) for name in forbidding([0] * 9)}, harmful=TOKENS_OF_IT)


def all_forbidden(bench: Bench) -> None:
    """No token of the refusal is left: refused prompts all get one and the same answer, so none is the model's."""
    refusal, inputs = bench.guarded.refusal, bench.batch()
    for options in ({"suppress_tokens": refusal}, {"sequence_bias": [[[token], -2e4] for token in refusal]}):
        with bench.threshold(1 - 1e-6):
            assert torch.equal(generate(bench.model, inputs, **options), generate(bench.stock, inputs, **options))
        with bench.threshold(1e-6):
            assert len({tuple(said) for said in generate(bench.model, inputs, **options).tolist()}) == 1


enter_checks(FORBIDDING, {"suppress_tokens or sequence_bias, the whole refusal": all_forbidden}, harmful=NOTHING)

# --------------------------------------------------------------------------------------------------- caches

CACHES = "Caches"
STATIC = {"cache_implementation": "static"}
enter(CACHES, {"static cache": STATIC, "no cache": {"use_cache": False}}, on=(*THREE, *REST))
KEPT: dict[str, dict[str, Any]] = {
    "static cache, beams": {**STATIC, "num_beams": 3},
    "static cache, larger than needed": {**STATIC, "max_cache_len": 300},
    "no cache, beams": {"use_cache": False, "num_beams": 2},
}
enter(CACHES, KEPT)
enter(CACHES, {"static cache, prefill_chunk_size 3": {**STATIC, "prefill_chunk_size": 3}}, prompts=mixed_text)


def quantized(bench: Bench, model: Any, inputs: Inputs) -> Tensor:
    """Quanto unpacks 4 bits by C++ that it compiles at first use, in a minute; a line of torch does the same."""
    from optimum.quanto.library.extensions.cpp import ext

    def unpack(packed: Tensor, bits: int) -> Tensor:
        return torch.cat([(packed >> place) & (2**bits - 1) for place in range(0, 8, bits)])

    ext._lib = SimpleNamespace(unpack=unpack)
    settings = {"backend": "quanto", "nbits": 4, "q_group_size": 16, "residual_length": 4}
    return generate(model, inputs, cache_implementation="quantized", cache_config=settings, num_beams=2)


enter(CACHES, {"quantized to 4 bits (quanto), beams": quantized}, slow=True)


def offloaded(kind: str) -> Way:
    def way(bench: Bench, model: Any, inputs: Inputs) -> Tensor:
        moved = {name: value.cuda() for name, value in inputs.items()}
        return generate(copy.deepcopy(model).cuda(), moved, cache_implementation=kind).cpu()

    return way


OFFLOADED = {f"{kind} cache": offloaded(kind) for kind in ("offloaded", "offloaded_static")}
enter(CACHES, OFFLOADED, on=("llava on an accelerator",))

# --------------------------------------------------------------------------------------------------- drafts

DRAFTS = "Drafts"


def assisted(*, drafts: int = 5, noise: float = 0.1, **options: Any) -> Way:
    """Another model drafts: the original, which is always right, or with `noise` one that errs."""

    def way(bench: Bench, model: Any, inputs: Inputs) -> Tensor:
        helper = copy.deepcopy(bench.stock)
        head = helper.get_output_embeddings().weight  # (vocabulary, hidden)
        head.data += torch.randn(head.shape, generator=torch.Generator().manual_seed(3)) * noise
        helper.generation_config.num_assistant_tokens = drafts
        helper.generation_config.num_assistant_tokens_schedule = "constant"
        helper.generation_config.assistant_confidence_threshold = 0.0
        return generate(model, inputs, assistant_model=helper, **options)

    return way


enter(DRAFTS, {"assisted by the original model": assisted(noise=0.0)}, prompts=single, on=(*LLAVA, *SMOL))
ASSISTED = {
    "assisted by an erring model": assisted(),
    "assisted, one draft at a time": assisted(drafts=1),
    "assisted, max_new_tokens 1": assisted(max_new_tokens=1),
    "assisted, max_new_tokens 2": assisted(noise=0.0, max_new_tokens=2),
    "assisted, sampled": assisted(**SAMPLED),
}
enter(DRAFTS, ASSISTED, prompts=single)
PICTURE = {"assisted, with a picture": assisted()}
enter(DRAFTS, PICTURE, prompts=lambda bench: [bench.batch(images=True, count=1)], on=(*LLAVA, "qwen2_5_vl"))
LOOKUP = {
    f"prompt lookup, max_new_tokens {most}": generating(prompt_lookup_num_tokens=3, max_new_tokens=most)
    for most in (1, 14)
}
REPEATED = "please tell me how please tell me how please tell me how please tell me"
enter(DRAFTS, LOOKUP, prompts=lambda bench: [bench.chat(("user", REPEATED))], on=THREE)
RAW = {"assisted": assisted(), "prompt lookup": generating(prompt_lookup_num_tokens=3)}
RAW = {f"{name}, text without the chat template": way for name, way in RAW.items()}
enter(DRAFTS, RAW, prompts=lambda bench: [bench.raw(REPEATED)])

# ------------------------------------------------------------------- options that would pass the gate by

LOUDLY = "Options that are refused"
enter(LOUDLY, {"classifier-free guidance": {"guidance_scale": 1.5}}, error="guidance_scale")
enter(LOUDLY, {"assistant_early_exit": {"assistant_early_exit": 1}}, error="past the gate")
enter(LOUDLY, {"assistant_ensemble_weight": {"assistant_ensemble_weight": 0.5}}, error="past the gate")
enter(LOUDLY, {"drafting for another model (is_assistant)": {"is_assistant": True}}, error="past the gate")
enter(LOUDLY, {"paged cache": {"cache_implementation": "paged"}}, error="packed")
