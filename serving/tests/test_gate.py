"""The gate's rule, without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sasa_vllm import gate as module
from sasa_vllm.gate import Gate, GatedSampler
from sasa_vllm.lane import Lane, LaneAttention, Tail
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


class FourTokens(Lane):
    """A lane over four tokens, whose P(unsafe) is always 0.25."""

    def __init__(self) -> None:
        self.tokens, self.judged = 4, []

    def judge(self, tails: list[Tail]) -> torch.Tensor:
        self.judged += [(tail.states[:, 0].tolist(), tail.positions.tolist()) for tail in tails]
        return torch.full((len(tails),), 0.25)


def follow(gate: Gate, *pieces: tuple[str, int, int]) -> dict[int, int]:
    """The refused rows of a step that runs (name, first token, count); a token's projection is its number."""
    numbers = torch.tensor([first + place for _, first, count in pieces for place in range(count)])  # (tokens,)
    ends = torch.stack([numbers * 0, numbers, numbers * 0, numbers * 0], dim=-1).float()  # (tokens, 4 * hidden)
    names = [name for name, *_ in pieces]
    gate.follow(ends, names, numbers + 100)
    return gate.refused(names)


TEN = [9, 9, 9, 9, 9, 9, 9, 9, 1, 2]


def test_the_lane_runs_over_the_last_tokens_however_they_come(gate: Gate) -> None:
    gate.lane = FourTokens()
    step(gate, {"a": 6, "b": 10, "c": 3}, new("a", TEN), new("b", TEN), new("c", [9, 1, 2]))
    assert follow(gate, ("c", 0, 3), ("a", 0, 6), ("b", 0, 10)) == {}
    step(gate, {"a": 3, "b": 1}, computed={"a": 6, "b": 10})
    assert follow(gate, ("a", 6, 3), ("b", 10, 1)) == {}
    step(gate, {"a": 1}, computed={"a": 9})
    assert follow(gate, ("a", 9, 1)) == {}
    last = ([6, 7, 8, 9], [106, 107, 108, 109])
    assert gate.lane.judged == [([0, 1, 2], [100, 101, 102]), last, last]
    assert all(request.tail is None for request in gate.requests.values())


def test_a_prompt_without_all_of_its_last_tokens_is_refused(gate: Gate) -> None:
    gate.lane = FourTokens()
    step(gate, {"a": 3, "b": 4, "c": 2}, new("a", TEN, 7), new("b", TEN, 6), new("c", [9, 1, 2], 1))
    assert follow(gate, ("a", 7, 3), ("b", 6, 4), ("c", 1, 2)) == {0: 5, 2: 5}
    assert gate.lane.judged == [([6, 7, 8, 9], [106, 107, 108, 109])]


def test_a_prompt_with_a_hole_before_its_last_tokens(gate: Gate) -> None:
    """What lies before a hole is not taken for what lies before the tokens behind it."""
    gate.lane = FourTokens()
    step(gate, {"a": 6, "b": 6, "c": 6}, *(new(name, TEN) for name in "abc"))
    follow(gate, *((name, 0, 6) for name in "abc"))
    step(gate, {"a": 2, "b": 5, "c": 4}, computed={"a": 8, "b": 5, "c": 6})  # b and c: preempted, with cached tokens
    assert follow(gate, ("a", 8, 2), ("b", 5, 5), ("c", 6, 4)) == {0: 5}
    assert [states for states, _ in gate.lane.judged] == [[6, 7, 8, 9]] * 2


@pytest.mark.parametrize("window", [None, 2])
def test_attention_of_the_lane(window: int | None) -> None:
    """Each row apart, causal, in a window where the block has one, with two query heads to one of keys."""
    from vllm.model_executor.layers.attention import Attention

    attention = object.__new__(Attention)
    torch.nn.Module.__init__(attention)
    attention.layer_name, attention.kv_sharing_target_layer_name, attention.has_sink = "0", None, False
    attention.head_size, attention.sliding_window, attention.impl = 4, window, SimpleNamespace(scale=0.5)
    query, key, value = torch.randn(6, 8), torch.randn(6, 4), torch.randn(6, 4)  # two rows of three tokens
    found = LaneAttention(attention, 3)(query, key, value)  # (6, 8)
    for token in range(6):
        first = max(token - token % 3, token - (window or 3) + 1)
        for head in range(2):
            scores = key[first : token + 1] @ query[token, 4 * head : 4 * head + 4] * 0.5  # (seen,)
            expected = scores.softmax(0) @ value[first : token + 1]  # (4,)
            torch.testing.assert_close(found[token, 4 * head : 4 * head + 4], expected)


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
