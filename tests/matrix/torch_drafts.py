"""Drafts: another model, or the prompt itself, guesses tokens that the main model checks several at a time."""

import copy
from typing import Any

import torch
from torch import Tensor

from matrix.bench import Bench, Inputs, generate, way
from matrix.by_hand import ByHand
from matrix.outcome import Outcome, row

SECTION = "Drafts"


def helper(bench: Bench, *, drafts: int = 5, another: bool = False) -> Any:
    """An unguarded model that drafts: the stock one, which is always right, or one that errs."""
    model = copy.deepcopy(bench.stock)
    if another:
        noise = torch.Generator().manual_seed(3)
        with torch.no_grad():
            head = model.get_output_embeddings().weight  # (vocabulary, hidden)
            head.add_(torch.randn(head.shape, generator=noise) * 0.1)
    model.generation_config.num_assistant_tokens = drafts
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0.0
    return model


for drafts in (1, 5):
    for another in (False, True):
        row("torch", SECTION, f"assisted by {'an erring' if another else 'the stock'} model, {drafts} drafts")(
            lambda bench, drafts=drafts, another=another: bench.both_verdicts(
                way(assistant_model=helper(bench, drafts=drafts, another=another)), bench.one()
            )
        )

for tokens in (1, 2, 3):
    row("torch", SECTION, f"assisted, max_new_tokens {tokens}")(
        lambda bench, tokens=tokens: bench.both_verdicts(
            way(assistant_model=helper(bench), max_new_tokens=tokens), bench.one()
        )
    )


@row("torch", SECTION, "assisted and sampled")
def assisted_sampled(bench: Bench) -> Outcome:
    options = {"assistant_model": helper(bench, another=True), "do_sample": True, "temperature": 1.5}
    return bench.both_verdicts(way(**options), bench.one())


@row("torch", SECTION, "assisted, with a picture", ("llava", "qwen2_5_vl"))
def assisted_picture(bench: Bench) -> Outcome:
    return bench.both_verdicts(way(assistant_model=helper(bench, another=True)), bench.one(images=True))


@row("torch", SECTION, "assisted, prompt without the chat template")
def assisted_raw(bench: Bench) -> Outcome:
    options = {"assistant_model": helper(bench, another=True)}
    return bench.both_verdicts(way(**options), bench.raw("please tell me how to cook rice"))


@row("torch", SECTION, "assisted, draft's words mixed in (assistant_ensemble_weight)")
def assisted_ensemble(bench: Bench) -> Outcome:
    options = {"assistant_model": helper(bench), "assistant_ensemble_weight": 0.0}
    return bench.loud(lambda: generate(bench.model, bench.one(), **options), "unguarded model")


@row("torch", SECTION, "the guarded model drafts for an unguarded one")
def assistant_role(bench: Bench) -> Outcome:
    run = way(assistant_model=bench.model)
    return bench.loud(lambda: run(bench.stock, bench.one()), "does not guard the model that it drafts for")


@row("torch", SECTION, "the guarded model drafts for itself")
def assists_itself(bench: Bench) -> Outcome:
    return bench.loud(
        lambda: generate(bench.model, bench.one(), assistant_model=bench.model), "does not guard the model"
    )


@row("torch", SECTION, "assistant_early_exit")
def early_exit(bench: Bench) -> Outcome:
    return bench.loud(lambda: generate(bench.model, bench.one(), assistant_early_exit=2), "blocks that judge")


for tokens in (1, 2, 14):

    @row("torch", SECTION, f"prompt lookup, max_new_tokens {tokens}")
    def lookup(bench: Bench, tokens: int = tokens) -> Outcome:
        options = {"prompt_lookup_num_tokens": 3, "max_new_tokens": tokens}
        return bench.both_verdicts(way(**options), repeated(bench))


@row("torch", SECTION, "prompt lookup, sampled, without the chat template")
def lookup_raw(bench: Bench) -> Outcome:
    options = {"prompt_lookup_num_tokens": 3, "do_sample": True}
    return bench.both_verdicts(way(**options), bench.raw("tell me how tell me how tell me how tell me"))


@row("torch", SECTION, "drafts of a head that this model has not (use_mtp)")
def mtp(bench: Bench) -> Outcome:
    return bench.like_stock(way(use_mtp=True), bench.one(), ".", kind=Exception)


@row("torch", SECTION, "drafts by DFlash, with a model that cannot")
def dflash(bench: Bench) -> Outcome:
    run = way(speculation_type="dflash", assistant_model=helper(bench))
    return bench.like_stock(run, bench.one(), ".", kind=Exception)


@row("torch", SECTION, "drafts checked by hand, those of the stock model")
def drafts_by_hand(bench: Bench) -> Outcome:
    """Feed a draft of three tokens at once, keep what the model would have said, crop the rest."""
    inputs = bench.one()
    drafted = generate(bench.stock, inputs)  # (1, tokens)

    def run(model: Any, inputs: Inputs) -> Tensor:
        loop = ByHand(bench, model).feed_prompt(inputs, [inputs["input_ids"].shape[1]])
        said = [loop.logits.argmax(-1)]  # (1,) each
        while len(said) < drafted.shape[1] - 3:
            place = len(said)
            tokens = torch.stack([said[-1], *drafted[:, place : place + 3].unbind(1)], dim=1)  # (1, 4)
            length = loop.mask.shape[1] if loop.mask is not None else 0
            choices = loop.all_logits(tokens).argmax(-1)  # (1, 4)
            agree = int((choices[0, :-1] == tokens[0, 1:]).long().cumprod(-1).sum())
            said += choices[:, : agree + 1].unbind(1)
            loop.crop(length + 1 + agree)
        return torch.stack(said, dim=1)

    return bench.both_verdicts(run, inputs)


def repeated(bench: Bench) -> Inputs:
    """A prompt that says the same several times, so that there is something to look up."""
    return bench.chat(("user", "please tell me how please tell me how please tell me how please tell me"))
