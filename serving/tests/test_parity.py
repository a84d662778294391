"""P(unsafe), verdicts and greedy answers are those of transformers, however vLLM runs the prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import BOTH, Model
from engine import serve

NAMES = (
    "llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "idefics3", "gemma3",
    "mistral3", "internvl", "glm4v", "none", "smol",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@BOTH
def test_as_in_transformers(model: Callable[[str], Model], name: str, v2: bool) -> None:
    """Text and pictures in one batch; again out of the prefix cache; four answers to each; with others aborted."""
    guarded = model(name)
    prompts, aborted = guarded.prompts, [{**prompt, "abort": 5} for prompt in guarded.prompts[:2]]
    four = [{**prompt, "params": {"n": 4, "temperature": 1.0, "top_k": 1}} for prompt in prompts[:4]]
    batches = (prompts, prompts, four, aborted + prompts[2:])
    (first, again, fours, mixed), counters = serve(guarded.directory, *batches, v2=v2)
    guarded.check(first, prompts)
    guarded.check(again, prompts)
    guarded.check(mixed[2:], prompts[2:])
    for outcome, prompt in zip(fours, four, strict=True):
        guarded.check([{**outcome, "answers": [answer]} for answer in outcome["answers"]], [prompt] * 4)
        assert len(outcome["probabilities"]) == 4
    assert counters["vllm:prefix_cache_hits"] > 0


@pytest.mark.parametrize(
    "name, budget", [("smol", 16), ("smol", 40), ("llava", 16), ("qwen2_5_vl", 16), ("gemma3", 40)]
)
@BOTH
def test_chunks(model: Callable[[str], Model], name: str, budget: int, v2: bool) -> None:
    """So many tokens a step: prompts are cut into pieces, and mixed with answers that go on."""
    guarded = model(name)
    options = {"max_num_batched_tokens": budget, "max_num_seqs": 8, "v2": v2}
    (first, again), _ = serve(guarded.directory, guarded.prompts, guarded.prompts, **options)
    guarded.check(first, guarded.prompts)
    guarded.check(again, guarded.prompts)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("last", [1, 3])
@BOTH
def test_last_chunk(model: Callable[[str], Model], name: str, last: int, v2: bool) -> None:
    """A prompt whose last step brings so few tokens that the lane runs over those of earlier steps too."""
    guarded = model(name)
    for prompt in (prompt for prompt in guarded.prompts[:4] if prompt["picture"] is None):
        budget = len(prompt["ids"]) - last
        (found,), _ = serve(guarded.directory, [prompt], max_num_batched_tokens=budget, max_num_seqs=8, v2=v2)
        guarded.check(found, [prompt])


@BOTH
def test_preemption(model: Callable[[str], Model], v2: bool) -> None:
    """In a cache for a few requests, running ones are thrown out and come back: with their verdicts."""
    guarded = model("llava")
    prompts = [{**prompt, "params": {"max_tokens": 64, "ignore_eos": True}} for prompt in guarded.prompts]
    small = {"max_model_len": 256, "num_gpu_blocks_override": 12, "enable_prefix_caching": False}
    (roomy,), _ = serve(guarded.directory, prompts, v2=v2)
    (tight,), counters = serve(guarded.directory, prompts, v2=v2, **small)
    assert counters["vllm:num_preemptions"] > 0
    for outcome, expected, prompt in zip(tight, roomy, prompts, strict=True):
        assert outcome["answers"] == expected["answers"]
        assert outcome["probability"] == pytest.approx(prompt["probability"], abs=1e-4)
        assert len(outcome["probabilities"]) == 1, "a verdict was given twice"


@pytest.mark.parametrize("name", ["llava"])
def test_two_processes(model: Callable[[str], Model], name: str) -> None:
    guarded = model(name)
    (found,), _ = serve(guarded.directory, guarded.prompts, tensor_parallel_size=2)
    guarded.check(found, guarded.prompts)


def test_compiled(model: Callable[[str], Model]) -> None:
    """vLLM compiles the decoder where it is not told otherwise; the lane is compiled with it."""
    guarded = model("llava")
    (found,), _ = serve(guarded.directory, guarded.prompts, enforce_eager=False)
    guarded.check(found, guarded.prompts)


def test_settings_are_followed(model: Callable[[str], Model], tmp_path: Path) -> None:
    """The operator's threshold and refusal."""
    guarded = model("llava")
    directory = guarded.edited(tmp_path, threshold=0.0001, refusal="the small dog")
    prompts = [prompt for prompt in guarded.prompts if prompt["picture"] is None]
    (found,), _ = serve(directory, prompts)
    said = {tuple(outcome["answers"][0]) for outcome in found}
    assert len(said) == 1 and said != {tuple(guarded.sasa["refusal_token_ids"])}


@pytest.mark.parametrize("name", ["llava", "smol"])
def test_a_gate_that_observes(model: Callable[[str], Model], tmp_path: Path, name: str) -> None:
    """Every prompt is judged as ever, and every answer and every logprob's place is the unguarded engine's."""
    guarded = model(name)
    prompts = [{**prompt, "params": {"logprobs": 2}} for prompt in guarded.prompts]
    (observed,), _ = serve(guarded.edited(tmp_path, gate="observe"), prompts)
    (plain,), _ = serve(guarded.folder / "stock", prompts)
    for outcome, free, prompt in zip(observed, plain, prompts, strict=True):
        assert outcome["probability"] == pytest.approx(prompt["probability"], abs=1e-4)
        assert outcome["answers"] == free["answers"] and outcome["candidates"] == free["candidates"]
