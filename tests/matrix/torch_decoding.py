"""Ways to pick the next token: search, sampling, beams, and the options that bend them."""

from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TextStreamer

from matrix.bench import EVERY, TOKENS, Bench, Inputs, Named, generate, way
from matrix.outcome import NOTHING, UNCHANGED, Outcome, row

PICKING, OPTIONS = "Picking the next token", "Options that bend the choice"

for name, options in Named(
    {
        "greedy search": {},
        "beam search": {"num_beams": 3},
    }
).items():
    row("torch", PICKING, name, EVERY)(lambda bench, options=options: bench.mixed_verdicts(way(**options)))

for name, options in Named({
    "sampling at temperature 1.5": {"do_sample": True, "temperature": 1.5},
    "sampling at temperature 50": {"do_sample": True, "temperature": 50.0},
    "top-k": {"do_sample": True, "top_k": 5},
    "top-p": {"do_sample": True, "top_p": 0.6},
    "min-p": {"do_sample": True, "min_p": 0.2},
    "typical, epsilon and eta cutoffs": {
        "do_sample": True, "typical_p": 0.3, "epsilon_cutoff": 0.02, "eta_cutoff": 0.02,
    },
    "beam search with sampling": {"num_beams": 3, "do_sample": True, "temperature": 1.5},
    "beam search that stops early": {"num_beams": 3, "early_stopping": True, "length_penalty": 2.0},
    "several answers a prompt, sampled": {"do_sample": True, "num_return_sequences": 3},
    "renormalised and invalid values removed": {
        "do_sample": True, "renormalize_logits": True, "remove_invalid_values": True,
    },
    "watermarking": {"watermarking_config": {"bias": 5.0, "seeding_scheme": "lefthash"}},
}).items():  # fmt: skip
    row("torch", PICKING, name)(lambda bench, options=options: bench.mixed_verdicts(way(**options)))


@row("torch", PICKING, "several answers a prompt, from beams")
def several_beams(bench: Bench) -> Outcome:
    found = bench.mixed_verdicts(way(num_beams=4, num_return_sequences=3), best_of=3)
    return found.but("the beams of a row differ by construction: the best is the refusal, others use its words")


@row("torch", PICKING, "streaming")
def streaming(bench: Bench) -> Outcome:
    def run(model: Any, inputs: Inputs) -> torch.Tensor:
        streamer = TextStreamer(bench.tokenizer, skip_prompt=True)
        said: list[str] = []
        streamer.on_finalized_text = lambda text, stream_end=False: said.append(text)
        answer = generate(model, inputs, streamer=streamer)
        assert "".join(said) == bench.tokenizer.decode(answer[0])
        return answer

    return bench.both_verdicts(run, bench.one())


for name, options in Named(
    {
        "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
        "DoLa": {"dola_layers": "high"},
        "diverse beam search": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
        "constrained beam search": {"num_beams": 2, "force_words_ids": [[70]]},
    }
).items():

    @row("torch", PICKING, name)
    def moved_to_the_hub(bench: Bench, options: dict[str, Any] = options) -> Outcome:
        return bench.like_stock(way(**options), bench.one(), "custom_generate|trust_remote_code", kind=Exception)


@row("torch", PICKING, "a decoding loop of one's own in generate (custom_generate)")
def custom_generate(bench: Bench) -> Outcome:
    def loop(
        model: Any, input_ids: torch.Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
        **model_kwargs: Any,
    ) -> torch.Tensor:  # fmt: skip
        while input_ids.shape[1] < generation_config.max_length:
            first = model_kwargs["past_key_values"].get_seq_length() == 0
            prepared = model.prepare_inputs_for_generation(
                input_ids, next_sequence_length=None if first else 1, is_first_iteration=first, **model_kwargs
            )
            output = model(**prepared)
            model_kwargs = model._update_model_kwargs_for_generation(output, model_kwargs)
            token = logits_processor(input_ids, output.logits[:, -1]).argmax(-1, keepdim=True)  # (batch, 1)
            input_ids = torch.cat([input_ids, token], dim=-1)
        return input_ids

    return bench.mixed_verdicts(lambda model, inputs: generate(model, inputs, custom_generate=loop)).but(
        "allowed rows run on behind their end in both models alike"
    )


# ------------------------------------------------------------------------------------- options


for name, options in Named(
    {
        "repetition_penalty 1.8": {"repetition_penalty": 1.8},
        "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
        "max_new_tokens 1": {"max_new_tokens": 1},
        "max_new_tokens 3": {"max_new_tokens": 3},
    }
).items():
    row("torch", OPTIONS, name)(lambda bench, options=options: bench.mixed_verdicts(way(**options)))


def forbidding(bench: Bench) -> dict[str, dict[str, Any]]:
    """Options that forbid the token which the refusal wants next."""
    refusal = bench.guarded.refusal
    longer = {"min_new_tokens": len(refusal) + 4, "max_new_tokens": len(refusal) + 6}
    return {
        "no_repeat_ngram_size 1": {"no_repeat_ngram_size": 1, "max_new_tokens": 8},
        "no_repeat_ngram_size 1, beams, sampled": {
            "no_repeat_ngram_size": 1, "num_beams": 3, "do_sample": True, "max_new_tokens": 6,
        },
        "min_new_tokens": longer,
        "min_new_tokens, beams": {**longer, "num_beams": 3},
        "min_new_tokens, sampled at temperature 2": {**longer, "do_sample": True, "temperature": 2.0},
        "bad_words_ids": {"bad_words_ids": [[refusal[1]], [refusal[3]]]},
        "suppress_tokens": {"suppress_tokens": [refusal[0], refusal[2]]},
        "suppress_tokens, all words but one": {"suppress_tokens": refusal[1:]},
        "begin_suppress_tokens": {"begin_suppress_tokens": [refusal[0]]},
        "sequence_bias": {"sequence_bias": [[[refusal[1]], -50.0], [[70], 50.0]]},
        "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 1.5)},
        "forced_eos_token_id": {"forced_eos_token_id": refusal[-1], "max_new_tokens": 4},
    }  # fmt: skip


FORBIDDING = (
    "no_repeat_ngram_size 1", "no_repeat_ngram_size 1, beams, sampled", "min_new_tokens", "min_new_tokens, beams",
    "min_new_tokens, sampled at temperature 2", "bad_words_ids", "suppress_tokens",
    "suppress_tokens, all words but one", "begin_suppress_tokens", "sequence_bias",
    "exponential_decay_length_penalty", "forced_eos_token_id",
)  # fmt: skip

for name in FORBIDDING:
    row("torch", OPTIONS, name)(
        lambda bench, name=name: bench.mixed_verdicts(way(**forbidding(bench)[name]), exactly=False)
    )


class _Among(LogitsProcessor):
    """Allows some tokens and amplifies what the logits tell of them."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        kept = torch.full_like(scores, -torch.inf)  # (batch, vocabulary)
        kept[:, self.tokens] = scores[:, self.tokens] * 1e6
        return kept


def all_forbidden(bench: Bench, **extra: Any) -> Outcome:
    """With every word of the refusal forbidden, refused prompts all get one answer, whatever they asked."""
    inputs = bench.batch(count=6)
    scores = bench.guarded.expected(inputs)  # (rows,)
    value, refused = bench.split(scores)
    expected = generate(bench.stock, inputs, **extra)
    with bench.threshold(value):
        found = generate(bench.model, inputs, **extra)
    bench.unchanged(found, expected, refused)
    with bench.threshold(1e-6):
        said = {tuple(answer) for answer in generate(bench.model, inputs, **extra).tolist()}
    assert len(said) == 1, "refused prompts get different answers, so these are the model's own"
    return Outcome(NOTHING, UNCHANGED, "all logits of a refused row but the refusal's are one number")


@row("torch", OPTIONS, "suppress_tokens, the whole refusal")
def suppress_all(bench: Bench) -> Outcome:
    return all_forbidden(bench, suppress_tokens=bench.guarded.refusal)


@row("torch", OPTIONS, "prefix_allowed_tokens_fn")
def prefix_allowed(bench: Bench) -> Outcome:
    allowed = [token for token in range(60, 200) if token not in bench.guarded.refusal]
    return all_forbidden(bench, prefix_allowed_tokens_fn=lambda batch, ids: allowed)


@row("torch", OPTIONS, "a logits processor that allows other words and amplifies them")
def own_processor(bench: Bench) -> Outcome:
    allowed = [token for token in range(60, 200) if token not in bench.guarded.refusal]
    return all_forbidden(bench, logits_processor=LogitsProcessorList([_Among(allowed)]))


@row("torch", OPTIONS, "classifier-free guidance")
def guidance(bench: Bench) -> Outcome:
    inputs, negative = bench.one(), bench.one(seed=2)["input_ids"]
    bench.loud(lambda: generate(bench.model, inputs, guidance_scale=1.5, negative_prompt_ids=negative), "guidance")
    return bench.loud(lambda: generate(bench.model, inputs, guidance_scale=0.0), "guidance_scale")


@row("torch", OPTIONS, "output_scores, output_logits, output_hidden_states in generate")
def outputs(bench: Bench) -> Outcome:
    def run(model: Any, inputs: Inputs) -> torch.Tensor:
        torch.manual_seed(0)
        found = model.generate(
            **inputs, max_new_tokens=TOKENS, return_dict_in_generate=True, output_scores=True, output_logits=True,
            output_hidden_states=True,
        )  # fmt: skip
        said = found.sequences[:, inputs["input_ids"].shape[1] :]
        assert len(found.hidden_states) == len(found.logits) == said.shape[1]
        return said

    return bench.mixed_verdicts(run).but("hidden states are the model's own, also of a refused row")
