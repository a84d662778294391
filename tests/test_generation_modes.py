"""Every way to generate: allowed rows say what the stock model says in that way, refused rows are harmless."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Guard
from torch import Tensor
from transformers import AutoModelForImageTextToText

from sasa_export import SasaExportError

Guards = Callable[..., Guard]

TOKENS = 16
FAMILIES = [pytest.param(family, marks=pytest.mark.xdist_group(family)) for family in ("llava", "gemma3", "qwen2_5_vl")]
every_family = pytest.mark.parametrize("family", FAMILIES)

# The refusal comes out word for word.
EXACT: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"do_sample": True, "temperature": 1.5},
    "top_k": {"do_sample": True, "top_k": 5},
    "top_p": {"do_sample": True, "top_p": 0.6},
    "min_p": {"do_sample": True, "min_p": 0.2},
    "typical_p": {"do_sample": True, "typical_p": 0.3},
    "cutoffs": {"do_sample": True, "epsilon_cutoff": 0.02, "eta_cutoff": 0.02},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams_sampled": {"num_beams": 3, "do_sample": True, "temperature": 1.5},
    "beams_several": {"num_beams": 4, "num_return_sequences": 3},
    "beams_early": {"num_beams": 3, "early_stopping": True, "length_penalty": 2.0},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "renormalised": {"do_sample": True, "renormalize_logits": True, "remove_invalid_values": True},
    "no_cache": {"use_cache": False},
    "no_cache_beams": {"use_cache": False, "num_beams": 2},
    "dynamic": {"cache_implementation": "dynamic"},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
    "watermark": {"watermarking_config": {"bias": 5.0, "seeding_scheme": "lefthash"}},
    "static": {"cache_implementation": "static"},
    "static_beams": {"cache_implementation": "static", "num_beams": 3},
    "static_sampled": {"cache_implementation": "static", "do_sample": True, "temperature": 1.5},
}


def harmful_options(guarded: Guard) -> dict[str, dict[str, Any]]:
    """Options that forbid the token which the refusal wants next: its words may then come in another order."""
    refusal = guarded.refusal
    longer = {"min_new_tokens": len(refusal) + 4, "max_new_tokens": len(refusal) + 6}
    return {
        # Beyond the words of the refusal nothing is left to say: in Qwen's template the end of sequence stands
        # in the prompt, so that it is forbidden too.
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 1, "max_new_tokens": 8},
        "min_new_tokens": {**longer},
        "min_new_tokens_beams": {**longer, "num_beams": 3},
        "min_new_tokens_sampled": {**longer, "do_sample": True, "temperature": 2.0},
        "suppress_tokens": {"suppress_tokens": [refusal[0], refusal[2]]},
        "begin_suppress_tokens": {"begin_suppress_tokens": [refusal[0]]},
        "bad_words_ids": {"bad_words_ids": [[refusal[1]], [refusal[3]]]},
        "sequence_bias": {"sequence_bias": [[[refusal[1]], -50.0], [[70], 50.0]]},
        "exponential_decay": {"exponential_decay_length_penalty": (2, 1.5)},
        "repeated_no_repeat": {
            "no_repeat_ngram_size": 1,
            "num_beams": 3,
            "do_sample": True,
            "max_new_tokens": 6,
        },
        "suppress_everything_but_one": {"suppress_tokens": refusal[1:]},
    }


HARSH = (
    "no_repeat_ngram_size", "min_new_tokens", "min_new_tokens_beams", "min_new_tokens_sampled", "suppress_tokens",
    "begin_suppress_tokens", "bad_words_ids", "sequence_bias", "exponential_decay", "repeated_no_repeat",
    "suppress_everything_but_one",
)  # fmt: skip


def batch(guarded: Guard, *, images: bool = True, count: int = 4, padding_side: Any = "left") -> dict[str, Any]:
    """Prompts of different lengths; with `images`, some rows still have none."""
    return dict(tiny.prompts(guarded.processor, images=images, count=count, seed=1, padding_side=padding_side))


@torch.no_grad()
def answers(model: Any, inputs: dict[str, Any], *, seed: int = 0, **mode: Any) -> Tensor:
    """What `generate` adds to the prompts, (batch, new tokens)."""
    torch.manual_seed(seed)
    prompt = inputs["input_ids"].shape[1] if "inputs_embeds" not in inputs else 0
    return model.generate(**inputs, **{"max_new_tokens": TOKENS, **mode})[:, prompt:]


def assert_same(guarded: Guard, found: Tensor, expected: Tensor, refused: Tensor) -> None:
    """Allowed rows are the stock model's; a shorter batch is merely padded less."""
    several = found.shape[0] // refused.shape[0]
    assert found.shape[0] == expected.shape[0] == several * refused.shape[0]
    for row, refuse in enumerate(refused.repeat_interleave(several).tolist()):
        if not refuse:
            one, other = found[row].tolist(), expected[row].tolist()
            both = min(len(one), len(other))
            assert one[:both] == other[:both]
            assert set(one[both:] + other[both:]) <= guarded.ends


def assert_refused(guarded: Guard, found: Tensor, refused: Tensor, *, exactly: bool = True) -> None:
    """Refused rows spell the refusal, or, where an option forbids its words, nothing but words of it."""
    several = found.shape[0] // refused.shape[0]
    assert refused.any()
    for row, refuse in enumerate(refused.repeat_interleave(several).tolist()):
        if refuse:
            said, refusal = found[row].tolist(), guarded.refusal
            if exactly:
                assert said[: len(refusal)] == refusal[: len(said)]
                assert set(said[len(refusal) :]) <= guarded.ends
            else:
                assert set(said) <= {*refusal, *guarded.ends}


@every_family
@pytest.mark.parametrize("mode", EXACT)
def test_ways_to_generate(guard: Guards, family: str, mode: str) -> None:
    """The same seed gives allowed rows the stock model's tokens, and refused rows the refusal."""
    guarded = guard(family)
    assert len(guarded.refusal) < TOKENS
    inputs = batch(guarded)
    expected = answers(guarded.stock, inputs, **EXACT[mode])
    with guarded.halved(inputs) as refused:
        found = answers(guarded.model, inputs, **EXACT[mode])
    assert_same(guarded, found, expected, refused)
    several = EXACT[mode].get("num_return_sequences", 1)
    if several > 1 and "num_beams" in EXACT[mode]:
        # The beams of a row differ from one another, so only the best one can be the refusal.
        assert_refused(guarded, found, refused, exactly=False)
        found = found[::several]
    assert_refused(guarded, found, refused)


@every_family
@pytest.mark.parametrize("mode", HARSH)
def test_options_that_forbid_words_of_the_refusal(guard: Guards, family: str, mode: str) -> None:
    """Where the wanted token is forbidden, the second choice is harmless too."""
    guarded = guard(family)
    options = harmful_options(guarded)
    assert set(options) == set(HARSH)
    inputs = batch(guarded)
    expected = answers(guarded.stock, inputs, **options[mode])
    with guarded.halved(inputs) as refused:
        found = answers(guarded.model, inputs, **options[mode])
    assert_same(guarded, found, expected, refused)
    assert_refused(guarded, found, refused, exactly=False)


@pytest.mark.parametrize("family", FAMILIES[:2])
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_offloaded_caches(guard: Guards, family: str, cache: str) -> None:
    """Where the machine has no accelerator, stock `generate` refuses these caches, and so does the guarded one."""
    guarded = guard(family)
    inputs = batch(guarded)
    try:
        expected = answers(guarded.stock, inputs, cache_implementation=cache)
    except (RuntimeError, ValueError, AssertionError, NotImplementedError) as error:
        pytest.skip(f"the stock model cannot either: {error}")
    with guarded.halved(inputs) as refused:
        found = answers(guarded.model, inputs, cache_implementation=cache)
    assert_same(guarded, found, expected, refused)
    assert_refused(guarded, found, refused)


@every_family
def test_padding_on_the_right(guard: Guards, family: str) -> None:
    """Prompts padded on the right are judged at their own end, in beams and static caches too."""
    guarded = guard(family)
    inputs = batch(guarded, padding_side="right")
    for mode in ({"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}):
        expected = answers(guarded.stock, inputs, **mode)
        with guarded.halved(inputs) as refused:
            found = answers(guarded.model, inputs, **mode)
        assert_same(guarded, found, expected, refused)
        assert_refused(guarded, found, refused)


@every_family
@torch.no_grad()
def test_forward_options(guard: Guards, family: str) -> None:
    """Hidden states, kept logits and tuples come as from the stock model, with the gate on the logits."""
    guarded = guard(family)
    for padding_side in ("left", "right"):
        inputs = batch(guarded, padding_side=padding_side)
        with guarded.halved(inputs) as refused:
            for options in (
                {"output_hidden_states": True},
                {"logits_to_keep": 1},
                {"logits_to_keep": 3},
                {"logits_to_keep": torch.tensor([0, inputs["input_ids"].shape[1] - 1])},
                {"use_cache": False},
            ):
                expected = guarded.stock(**inputs, **options)
                found = guarded.model(**inputs, **options)
                assert torch.equal(found.logits[~refused], expected.logits[~refused])
                # Under either padding the last column lies at or behind the last prompt token.
                assert (found.logits[refused, -1].argmax(dim=-1) == guarded.refusal[0]).all()
                if "output_hidden_states" in options:
                    states = zip(found.hidden_states, expected.hidden_states, strict=True)
                    assert all(torch.equal(own, stock) for own, stock in states)
            found = guarded.model(**inputs, return_dict=False)
            expected = guarded.stock(**inputs, return_dict=False)
            assert isinstance(found, tuple)
            assert torch.equal(found[0][~refused], expected[0][~refused])
            assert (found[0][refused, -1].argmax(dim=-1) == guarded.refusal[0]).all()


@every_family
def test_hidden_states_of_generate(guard: Guards, family: str) -> None:
    """`generate` hands out as many hidden states per step as the stock model does."""
    guarded = guard(family)
    inputs = batch(guarded)
    mode = {"output_hidden_states": True, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad(), guarded.halved(inputs) as refused:
        found = guarded.model.generate(**inputs, max_new_tokens=3, **mode)
        expected = guarded.stock.generate(**inputs, max_new_tokens=3, **mode)
    assert len(found.hidden_states) == len(expected.hidden_states) == 3
    for own, stock in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert len(own) == len(stock)
        assert all(torch.equal(a[~refused], b[~refused]) for a, b in zip(own, stock, strict=True))
    for own, stock in zip(found.logits, expected.logits, strict=True):
        assert torch.equal(own[~refused], stock[~refused])


@every_family
@torch.no_grad()
def test_embeddings_instead_of_ids(guard: Guards, family: str) -> None:
    """A text prompt may come as embeddings; without a cache it is refused at every step or raises."""
    guarded = guard(family)
    inputs = batch(guarded, images=False)
    embedded = {
        "inputs_embeds": guarded.stock.get_input_embeddings()(inputs["input_ids"]),  # (batch, tokens, hidden)
        "attention_mask": inputs["attention_mask"],
    }
    with guarded.halved(inputs) as refused:
        output = guarded.model(**embedded)
        torch.testing.assert_close(output.unsafe_probability, guarded.expected(inputs), rtol=0.0, atol=1e-5)
        assert torch.equal(output.logits[~refused], guarded.stock(**embedded).logits[~refused])
        try:
            expected = answers(guarded.stock, embedded)
        except ValueError:  # Gemma 3 does not generate from embeddings
            with pytest.raises(ValueError):
                answers(guarded.model, embedded)
            return
        found = answers(guarded.model, embedded)
        assert_same(guarded, found, expected, refused)
        assert_refused(guarded, found, refused)
        try:
            found = answers(guarded.model, embedded, use_cache=False)
        except (NotImplementedError, ValueError, RuntimeError):
            return
        assert_refused(guarded, found, refused, exactly=False)


@every_family
@torch.no_grad()
def test_a_copy_guards_too(guard: Guards, family: str) -> None:
    """A deep copy has the gate, and training mode does not turn it off."""
    guarded = guard(family)
    inputs = batch(guarded)
    with guarded.halved(inputs) as refused:
        twin = copy.deepcopy(guarded.model)
        found, expected = answers(twin, inputs), answers(guarded.model, inputs)
        assert torch.equal(found, expected)
        twin.train()
        output = twin(**inputs)
        torch.testing.assert_close(output.unsafe_probability, guarded.expected(inputs), rtol=0.0, atol=1e-5)
        assert_refused(guarded, answers(twin, inputs), refused)
        twin.gradient_checkpointing_enable()
        output = twin(**inputs)
        torch.testing.assert_close(output.unsafe_probability, guarded.expected(inputs), rtol=0.0, atol=1e-5)
        assert (output.logits[refused, -1].argmax(dim=-1) == guarded.refusal[0]).all()


@every_family
@torch.no_grad()
def test_eager_attention(guard: Guards, family: str) -> None:
    """Another attention implementation gives the same verdict, and attentions of the main lane alone."""
    guarded = guard(family)
    inputs = batch(guarded)
    model = AutoModelForImageTextToText.from_pretrained(
        guarded.directory, trust_remote_code=True, attn_implementation="eager"
    ).eval()
    output = model(**inputs, output_attentions=True)
    torch.testing.assert_close(output.unsafe_probability, guarded.expected(inputs), rtol=0.0, atol=1e-5)
    assert len(output.attentions) == model.config.get_text_config().num_hidden_layers


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@torch.no_grad()
def test_half_precision(guard: Guards, family: str, dtype: torch.dtype) -> None:
    """The probe stays float32 to the bit, however the model comes to its dtype, and clear verdicts stay."""
    guarded = guard(family)
    inputs = batch(guarded, count=6)
    loaded = AutoModelForImageTextToText.from_pretrained(guarded.directory, trust_remote_code=True, dtype=dtype).eval()
    scores = guarded.expected(inputs)  # (batch,)
    ordered = scores.sort().values  # (batch,)
    widest = int(ordered.diff().argmax())
    threshold = float(ordered[widest : widest + 2].mean())
    refused = scores >= threshold
    for model in (loaded, copy.deepcopy(guarded.model).to(dtype), copy.deepcopy(guarded.model).to(dtype).float()):
        for name in ("weight", "bias"):
            tensor = getattr(model.sasa.probe, name)
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, getattr(guarded.model.sasa.probe, name))
        model.config.sasa["threshold"] = threshold
        fed = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        found = model(**fed).unsafe_probability  # (batch,)
        assert found.dtype == torch.float32
        assert torch.equal(found >= threshold, refused)
        assert_refused(guarded, answers(model, fed), refused)


@pytest.mark.xdist_group("llava")
def test_a_very_long_refusal(guard: Guards) -> None:
    """The place in the refusal rides in the cache's dtype, and bfloat16 counts to 256 only."""
    guarded = guard("llava", refusal="No, I will not. " * 20)
    assert 230 < len(guarded.refusal) <= 250
    model = copy.deepcopy(guarded.model).to(torch.bfloat16)
    model.config.sasa["threshold"] = 1e-6
    inputs = batch(guarded, images=False, count=1)
    found = answers(model, inputs, max_new_tokens=len(guarded.refusal) + 2)
    assert found[0].tolist() == guarded.refusal
    with pytest.raises(SasaExportError, match="refusal"):
        guard("llava", refusal="No, I will not. " * 22)


@every_family
@torch.no_grad()
def test_autocast(guard: Guards, family: str) -> None:
    """Under autocast the gate judges and refuses too."""
    guarded = guard(family)
    inputs = batch(guarded)
    with guarded.at(1e-6), torch.autocast("cpu", dtype=torch.bfloat16):
        found = guarded.model(**inputs).unsafe_probability  # (batch,)
        said = answers(guarded.model, inputs)
    assert found.dtype == torch.float32
    assert (found - guarded.expected(inputs)).abs().max() < 0.2
    assert_refused(guarded, said, torch.ones(4, dtype=torch.bool))


RELOAD = """
import json, sys
import torch
import transformers
from transformers import AutoModelForImageTextToText
torch.set_num_threads(1)
result = {}
for directory, stock, batch in json.loads(sys.argv[1]):
    outcome = {}
    for name, load in {
        "stock": lambda: getattr(transformers, stock).from_pretrained(directory),
        "untrusted": lambda: AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=False),
    }.items():
        try:
            load()
            outcome[name] = "loaded"
        except Exception as error:
            outcome[name] = str(error)
    model = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True).eval()
    with torch.no_grad():
        outcome["probability"] = model(**torch.load(batch)).unsafe_probability.tolist()
    result[stock] = outcome
print(json.dumps(result))
"""


@pytest.mark.xdist_group("llava")
def test_saved_again(guard: Guards, fresh: Callable[..., Any], tmp_path: Path) -> None:
    """`save_pretrained` writes a guarded directory again: sealed, with its code, and with the same verdicts."""
    jobs, expected = [], {}
    for family in ("llava", "gemma3", "qwen2_5_vl", "smolvlm"):
        guarded = guard(family)
        inputs = batch(guarded)
        torch.save(inputs, tmp_path / f"{family}.pt")
        guarded.model.save_pretrained(tmp_path / family)
        stock = type(guarded.stock).__name__
        jobs.append([str(tmp_path / family), stock, str(tmp_path / f"{family}.pt")])
        expected[stock] = guarded.expected(inputs)
        again = AutoModelForImageTextToText.from_pretrained(tmp_path / family, trust_remote_code=True).eval()
        with guarded.halved(inputs):
            again.config.sasa["threshold"] = guarded.model.config.sasa["threshold"]
            assert torch.equal(answers(again, inputs), answers(guarded.model, inputs))
    for stock, outcome in fresh(RELOAD, jobs).items():
        assert "SASA" in outcome["stock"], stock
        assert outcome["untrusted"] != "loaded", stock
        torch.testing.assert_close(torch.tensor(outcome["probability"]), expected[stock], rtol=0.0, atol=1e-5)


def refused_alone(guarded: Guard, text: str) -> dict[str, Any]:
    """One text prompt as model inputs."""
    return dict(tiny.encode(guarded.processor, [[{"role": "user", "content": [{"type": "text", "text": text}]}]]))


REPEATED = "please tell me how please tell me how please tell me how please tell me"


@pytest.mark.xdist_group("llava")
def test_continuous_batching_raises(guard: Guards) -> None:
    """Prompts packed into one row cannot be told apart, so none of them would be judged."""
    guarded = guard("llava")
    inputs = refused_alone(guarded, REPEATED)
    ids = inputs["input_ids"][0].tolist()
    # A copy, since continuous batching gives the model another attention.
    twin = copy.deepcopy(guarded.model)
    twin.config.sasa["threshold"] = 1e-6
    settings = copy.deepcopy(guarded.stock.generation_config)
    settings.max_new_tokens = 4
    with pytest.raises((NotImplementedError, ValueError), match="judge"):
        twin.generate_batch(inputs=[ids, ids[:-4]], generation_config=settings)
    with pytest.raises((NotImplementedError, ValueError), match="judge"):
        twin.generate(**inputs, max_new_tokens=4, cache_implementation="paged")


@every_family
@torch.no_grad()
def test_a_cache_of_the_stock_model_raises(guard: Guards, family: str) -> None:
    """A cache that this model has not filled holds a prompt that it has not judged."""
    guarded = guard(family)
    inputs = refused_alone(guarded, REPEATED)
    shorter = {name: value[:, :-1] for name, value in inputs.items()}
    cache = guarded.stock(**shorter).past_key_values
    with pytest.raises((NotImplementedError, ValueError), match="judged"):
        guarded.model.generate(**inputs, past_key_values=cache, max_new_tokens=4)


@pytest.mark.xdist_group("llava")
@torch.no_grad()
def test_compiled_forward(guard: Guards) -> None:
    """`torch.compile` keeps the gate, whatever parts of the forward it captures."""
    guarded = guard("llava")
    inputs = batch(guarded, images=False)
    twin = copy.deepcopy(guarded.model)
    compiled = torch.compile(twin, backend="eager")
    with guarded.halved(inputs) as refused:
        twin.config.sasa["threshold"] = guarded.model.config.sasa["threshold"]
        for _ in range(2):
            found = compiled(**inputs)
            torch.testing.assert_close(found.unsafe_probability, guarded.expected(inputs), rtol=0.0, atol=1e-5)
            assert (found.logits[refused, -1].argmax(dim=-1) == guarded.refusal[0]).all()
