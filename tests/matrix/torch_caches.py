"""Kinds of cache, and what can be done to one between two calls."""

import pickle
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, QuantizedCache, StaticCache

from matrix.bench import EVERY, TOKENS, Bench, Inputs, Named, generate, way, without
from matrix.by_hand import ByHand
from matrix.outcome import Outcome, row

SECTION = "Caches"


def quanto_without_a_compiler() -> None:
    """Quanto unpacks 4 bits by C++ that it compiles at first use, in a minute; a line of torch does the same."""
    from optimum.quanto.library.extensions.cpp import ext

    def unpack(packed: Tensor, bits: int) -> Tensor:
        return torch.cat([(packed >> place) & (2**bits - 1) for place in range(0, 8, bits)])

    ext._lib = SimpleNamespace(unpack=unpack)


def quantized(bench: Bench, **options: Any) -> Outcome:
    quanto_without_a_compiler()
    settings = {"backend": "quanto", "nbits": 4, "q_group_size": 16, "residual_length": 4}
    return bench.mixed_verdicts(way(cache_implementation="quantized", cache_config=settings, **options))


row("torch", SECTION, "quantized to 4 bits (quanto)")(quantized)
row("torch", SECTION, "quantized to 4 bits (quanto), beams")(lambda bench: quantized(bench, num_beams=2))
row("torch", SECTION, "no cache", EVERY)(lambda bench: bench.mixed_verdicts(way(use_cache=False)))
row("torch", SECTION, "no cache, beams")(lambda bench: bench.mixed_verdicts(way(use_cache=False, num_beams=2)))
row("torch", SECTION, "static", EVERY)(lambda bench: bench.mixed_verdicts(way(cache_implementation="static")))

for name, options in Named(
    {
        "static, beams": {"cache_implementation": "static", "num_beams": 3},
        "static, sampled": {"cache_implementation": "static", "do_sample": True, "temperature": 1.5},
        "static, larger than needed": {"cache_implementation": "static", "max_cache_len": 300},
        "static, prefill_chunk_size 3": {"cache_implementation": "static", "prefill_chunk_size": 3},
        "quantized to fp8": {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},
    }
).items():
    row("torch", SECTION, name)(
        lambda bench, options=options: bench.mixed_verdicts(
            way(**options), bench.batch(images="prefill_chunk_size" not in options)
        )
    )


for kind in ("offloaded", "offloaded_static"):

    @row("torch", SECTION, f"{kind} (needs an accelerator)")
    def offloaded(bench: Bench, kind: str = kind) -> Outcome:
        run = way(cache_implementation=kind)
        if torch.cuda.is_available():
            return bench.mixed_verdicts(run)
        return bench.like_stock(run, bench.mixed, ".", kind=Exception)


def cache_of(bench: Bench, kind: str) -> Any:
    quanto_without_a_compiler()
    config = bench.stock.config.get_text_config(decoder=True)
    if kind == "static":
        return StaticCache(config=config, max_cache_len=120)
    if kind == "quantized":
        return QuantizedCache(backend="quanto", config=config, q_group_size=16, residual_length=4)
    return DynamicCache(config=config)


for kind, families in {"dynamic": EVERY, "static": EVERY, "quantized": ("llava",)}.items():

    @row("torch", SECTION, f"a {kind} cache of one's own, for one prompt after another (reset)", families)
    def reset_between(bench: Bench, kind: str = kind) -> Outcome:
        def run(model: Any, inputs: Inputs) -> Tensor:
            cache = cache_of(bench, kind)
            generate(model, bench.batch(count=4, seed=5), past_key_values=cache)
            cache.reset()
            return generate(model, inputs, past_key_values=cache)

        return bench.mixed_verdicts(run)


@row("torch", SECTION, "a static cache of one's own, by hand", EVERY)
def static_by_hand(bench: Bench) -> Outcome:
    def run(model: Any, inputs: Inputs) -> Tensor:
        loop = ByHand(bench, model)
        loop.cache = cache_of(bench, "static")
        tokens = inputs["input_ids"].shape[1]
        return loop.feed_prompt(inputs, [tokens - 5, tokens - 1, tokens]).say()

    return bench.mixed_verdicts(run, bench.batch(images=False))


def handed_on(bench: Bench, change: Any) -> Outcome:
    """Feed a prompt but for its last tokens, let `change` do something to the cache, and go on."""

    def run(model: Any, inputs: Inputs) -> Tensor:
        tokens = inputs["input_ids"].shape[1]
        loop = ByHand(bench, model).feed_prompt(inputs, [tokens - 2])
        loop.cache = change(loop.cache, model)
        return loop.feed(inputs["input_ids"][:, -2:]).say()

    return bench.both_verdicts(run, bench.one())


@row("torch", SECTION, "a cache that is pickled and read again")
def pickled(bench: Bench) -> Outcome:
    return handed_on(bench, lambda cache, model: pickle.loads(pickle.dumps(cache)))


def tensors(cache: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


@row("torch", SECTION, "a cache rebuilt from all its tensors")
def rebuilt(bench: Bench) -> Outcome:
    def change(cache: Any, model: Any) -> Any:
        return DynamicCache(tensors(cache))

    return handed_on(bench, change)


@row("torch", SECTION, "a cache rebuilt from the decoder's layers alone")
def rebuilt_without_ledger(bench: Bench) -> Outcome:
    def change(cache: Any, model: Any) -> Any:
        return DynamicCache(tensors(cache)[: model.config.get_text_config().num_hidden_layers])

    return bench.loud(lambda: handed_on(bench, change), "not judged")


@row("torch", SECTION, "a cache whose decoder's layers alone were shortened")
def shortened_without_ledger(bench: Bench) -> Outcome:
    def change(cache: Any, model: Any) -> Any:
        for layer in cache.layers[: model.config.get_text_config().num_hidden_layers]:
            layer.crop(-3)
        return cache

    return bench.loud(lambda: handed_on(bench, change), "not judged")


def filled_by(bench: Bench, fill: Any) -> Outcome:
    """Another module fills the cache with all of a prompt but its last token."""
    inputs = bench.one()

    def run() -> Tensor:
        shorter = {name: value[:, :-1] for name, value in inputs.items()}
        return generate(bench.model, inputs, past_key_values=fill(shorter))

    return bench.loud(run, "not judged")


@row("torch", SECTION, "a cache that the stock model filled", EVERY)
def filled_by_stock(bench: Bench) -> Outcome:
    return filled_by(bench, lambda inputs: bench.stock(**inputs, use_cache=True).past_key_values)


@row("torch", SECTION, "a cache that model.model filled", EVERY)
def filled_by_base(bench: Bench) -> Outcome:
    return filled_by(bench, lambda inputs: bench.model.model(**inputs, use_cache=True).past_key_values)


@row("torch", SECTION, "a cache that model.language_model filled", EVERY)
def filled_by_decoder(bench: Bench) -> Outcome:
    def fill(inputs: Inputs) -> Any:
        found = bench.model.model.language_model(**without(inputs, "token_type_ids", "mm_token_type_ids"))
        return found.past_key_values

    return filled_by(bench, fill)


@row("torch", SECTION, "a tuple of tensors as past_key_values")
def legacy(bench: Bench) -> Outcome:
    inputs = bench.one()
    kept = tuple(tensors(bench.model(**inputs).past_key_values))
    return bench.like_stock(way(past_key_values=kept), inputs, ".", kind=Exception)


@row("torch", SECTION, "the decoder's own layers after a call", EVERY)
def same_layers(bench: Bench) -> Outcome:
    """The layers that other tools read are the stock model's to the bit; the ledger stands behind them."""
    expected = tensors(bench.stock(**bench.mixed).past_key_values)
    for value in (1e-6, 1 - 1e-6):
        with bench.threshold(value):
            found = tensors(bench.model(**bench.mixed).past_key_values)
        assert len(found) > len(expected)
        for own, stock in zip(found, expected, strict=False):
            assert torch.equal(own[0], stock[0]) and torch.equal(own[1], stock[1])
    return bench.mixed_verdicts(way(max_new_tokens=TOKENS)).but("equal to the stock model's, whatever the verdict")
