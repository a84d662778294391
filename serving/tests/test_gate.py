"""The gate's rule, without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sasa_vllm import gate as module
from sasa_vllm.gate import Gate, GatedSampler
from sasa_vllm.metrics import Metrics
from sasa_vllm.requests import begins_answer

SASA = {
    "threshold": 0.5, "refusal_token_ids": [5, 6, 7], "generation_prompt_ids": [1, 2], "turn_token_ids": [1, 3],
}  # fmt: skip
NAN = float("nan")


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    monkeypatch.setattr(module, "get_tp_group", lambda: SimpleNamespace(broadcast=lambda tensor, src: tensor))
    return Gate(SASA, Metrics(reporting=False))


def new(name: str, prompt: list[int] | None, computed: int = 0) -> Any:
    parameters = SimpleNamespace(prompt_logprobs=1, prompt_logprob_token_ids=None)
    length = 4 if prompt is None else len(prompt)
    return SimpleNamespace(
        req_id=name, prompt_token_ids=prompt, prompt_len=length, num_computed_tokens=computed,
        sampling_params=parameters,
    )  # fmt: skip


def step(gate: Gate, counts: dict[str, int], *fresh: Any, finished: Any = (), computed: Any = None) -> None:
    cached = computed or {}
    data = SimpleNamespace(req_ids=list(cached), num_computed_tokens=list(cached.values()))
    gate.schedule(
        SimpleNamespace(
            finished_req_ids=set(finished), scheduled_new_reqs=fresh, scheduled_cached_reqs=data,
            num_scheduled_tokens=counts,
        )
    )  # fmt: skip


def refused(gate: Gate, names: list[str], *values: float) -> dict[int, int]:
    gate.probability = torch.tensor(values)
    return gate.refused(names)


def test_verdict_where_the_prompt_ends_and_then_the_refusal(gate: Gate) -> None:
    step(gate, {"a": 2, "b": 4}, new("a", [9, 9, 1, 2]), new("b", [9, 9, 1, 2]))
    assert refused(gate, ["a", "b"], 0.9, 0.9) == {1: 5}  # a's prompt goes on
    step(gate, {"a": 2, "b": 1}, computed={"a": 2, "b": 4})
    assert refused(gate, ["b", "a"], 0.1, 0.4) == {0: 6}
    step(gate, {"a": 1, "b": 1}, computed={"a": 4, "b": 5})
    assert refused(gate, ["b", "a"], 0.1, 0.9) == {0: 7}
    step(gate, {"b": 1}, computed={"b": 6}, finished=["a"])
    assert refused(gate, ["b"], 0.1) == {0: 7}  # the end of sequence, until the request ends
    assert set(gate.requests) == {"b"}


def test_what_cannot_be_judged_is_refused(gate: Gate) -> None:
    step(gate, {"nan": 4, "embedded": 4}, new("nan", [9, 9, 1, 2]), new("embedded", None))
    assert refused(gate, ["nan", "embedded", "unknown"], NAN, 0.1, 0.1) == {0: 5, 1: 5, 2: 5}


def test_no_verdict_behind_the_prompt(gate: Gate) -> None:
    """A request whose prompt's end was never seen has none, and so no answer."""
    step(gate, {"a": 1}, new("a", [9, 9, 1, 2], computed=4))
    assert refused(gate, ["a"], 0.1) == {0: 6}


def test_a_request_that_comes_back_keeps_its_verdict(gate: Gate) -> None:
    step(gate, {"a": 4, "b": 4}, new("a", [9, 9, 1, 2]), new("b", [9, 9, 1, 2]))
    assert refused(gate, ["a", "b"], 0.1, 0.9) == {1: 5}
    step(gate, {"a": 6, "b": 6}, computed={"a": 0, "b": 0})  # preempted, and computed again with two of its tokens
    assert refused(gate, ["a", "b"], 0.9, 0.1) == {1: 7}
    step(gate, {"a": 6}, new("a", [9, 9, 1, 2, 8, 8]))  # a session that goes on with a longer prompt
    assert refused(gate, ["a"], 0.9) == {0: 5}


def test_no_logits_without_a_probability(gate: Gate) -> None:
    step(gate, {"a": 4}, new("a", [9, 9, 1, 2]))
    with pytest.raises(RuntimeError, match="did not see"):
        gate.refused(["a"])
    with pytest.raises(RuntimeError, match="did not see"):
        refused(gate, ["a"], 0.1, 0.1)


def test_prompt_logprobs_never_reach_the_runner(gate: Gate) -> None:
    request = new("a", [9, 9, 1, 2])
    step(gate, {"a": 4}, request)
    assert request.sampling_params.prompt_logprobs is None


def test_the_sampler_cannot_change_a_refused_row(gate: Gate) -> None:
    """Whatever the runner's sampler says, the refusal's token is what is sampled; other rows keep logits and token."""
    seen = []

    def sampler(logits: torch.Tensor) -> Any:
        seen.append(logits)
        told = SimpleNamespace(logprob_token_ids=torch.tensor([[3, 3], [3, 3]]))
        return SimpleNamespace(sampled_token_ids=torch.tensor([[3], [3]]), logprobs_tensors=told)

    logits = torch.randn(2, 10)
    logits[1] = float("-inf")  # as a grammar leaves it
    step(gate, {"a": 4, "b": 4}, new("a", [9, 9, 1, 2]), new("b", [9, 9, 1, 2]))
    gate.probability = torch.tensor([0.1, 0.9])
    runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=["a", "b"]))
    output = GatedSampler(sampler, gate, runner)(logits)
    assert output.sampled_token_ids.tolist() == [[3], [5]]
    assert output.logprobs_tensors.logprob_token_ids.tolist() == [[3, 3], [5, 3]]
    assert torch.equal(seen[0][0], logits[0]) and seen[0][1].argmax() == 5 and seen[0][1].isfinite().all()


def test_a_gate_that_observes_judges_and_leaves_every_row_as_it_is(gate: Gate) -> None:
    counted = []
    metrics = SimpleNamespace(count=lambda *found, **how: counted.append((*found, how)))
    observing = Gate({**SASA, "gate": "observe"}, metrics)
    step(observing, {"a": 4, "b": 4, "c": 4}, *(new(name, [9, 9, 1, 2]) for name in "abc"))
    observing.probability = torch.tensor([0.25, 0.75, NAN])
    logits, runner = torch.randn(3, 10), SimpleNamespace(input_batch=SimpleNamespace(req_ids=["a", "b", "c"]))
    assert GatedSampler(lambda logits: logits, observing, runner)(logits) is logits
    assert [found[1:] for found in counted] == [(refused, {"enforced": False}) for refused in (False, True, True)]


@pytest.mark.parametrize(
    "prompt, begins",
    [
        ([9, 1, 2], False),
        ([9, 1, 2, 8], True),
        ([9, 1, 2, 8, 3, 9, 1, 2], False),  # the answer of an earlier turn
        ([9, 1, 2, 8, 3, 9], False),  # text that ends within the next turn
        ([9, 1, 2, 8, 1, 2, 8], True),
        ([9, 1], True),  # half a generation prompt
        ([9, 1, 4, 2, 8], True),  # a misspelt one
        ([1, 8, 9], True),  # a turn of the user's, left open
        ([9, 1, 2, 8, 3, 1, 8], True),
        ([1, 8, 9, 3], False),
        ([9, 1, 2, 3], False),
        ([9, 9], False),
        ([], False),
    ],
)
def test_begun_answers(prompt: list[int], begins: bool) -> None:
    assert begins_answer(SASA, prompt) == begins


def test_generation_prompt_that_begins_with_a_plain_word() -> None:
    """Then it marks no other turn, and half of it is text like any other."""
    plain = {**SASA, "turn_token_ids": [3]}
    assert begins_answer(plain, [9, 1, 2, 8])
    assert not begins_answer(plain, [9, 1]) and not begins_answer(plain, [9, 1, 2, 3, 1, 8])


def test_no_generation_prompt() -> None:
    assert not begins_answer({**SASA, "generation_prompt_ids": []}, [9, 1, 2, 8])
