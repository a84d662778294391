"""The OpenAI server: what a caller sees, and what an operator does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Model
from server import Server, messages, serving


@pytest.fixture(scope="module")
def guarded(model: Callable[[str], Model]) -> Model:
    return model("smol")


@pytest.fixture(scope="module")
def server(guarded: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(guarded.directory, tmp_path_factory.mktemp("server") / "log") as running:
        yield running


def test_answers_and_refusals(server: Server, guarded: Model) -> None:
    for prompt in (prompt for prompt in guarded.prompts if prompt["text"]):
        status, said = server.chat(prompt, guarded.folder, max_tokens=16)
        assert status == 200
        (choice,) = said["choices"]
        text, reason = choice["message"]["content"], choice["finish_reason"]
        assert (text == guarded.sasa["refusal"]) == (reason == "content_filter") == prompt["refused"], said


def test_streaming(server: Server, guarded: Model) -> None:
    for prompt in guarded.some(refused=True)[:2]:
        status, said = server.chat(prompt, guarded.folder, max_tokens=16, stream=True, n=2, temperature=1.0)
        assert status == 200
        events = [json.loads(line[6:]) for line in said.splitlines() if line.startswith("data: {")]
        for index in range(2):
            parts = [part for event in events for part in event["choices"] if part["index"] == index]
            assert "".join(part["delta"].get("content") or "" for part in parts) == guarded.sasa["refusal"]
            assert [part["finish_reason"] for part in parts if part["finish_reason"]] == ["content_filter"]


@pytest.mark.parametrize("stream", [False, True])
def test_completions(server: Server, guarded: Model, stream: bool) -> None:
    """The same of prompts in token ids, and of refusals that are cut short."""
    refused, allowed = (
        next(prompt["ids"] for prompt in guarded.some(refused=refused) if prompt["picture"] is None)
        for refused in (True, False)
    )
    word = guarded.sasa["refusal"].split()[1]
    for ids, options, reasons in (
        (refused, {}, {"content_filter"}),
        (refused, {"max_tokens": 2}, {"content_filter"}),
        (refused, {"max_tokens": 24, "ignore_eos": True}, {"content_filter"}),
        (refused, {"stop": [word]}, {"stop"}),
        (allowed, {}, {"stop", "length"}),
        (allowed, {"max_tokens": 2}, {"length"}),
    ):
        body = {"prompt": ids, "max_tokens": 16, "temperature": 0, "stream": stream, **options}
        said = server.ask("/v1/completions", body)[1]
        lines = said.splitlines() if stream else ["data: " + json.dumps(said)]
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        parts = [part for event in events for part in event["choices"]]
        found, text = {part["finish_reason"] for part in parts} - {None}, "".join(part["text"] for part in parts)
        assert len(found) == 1 and found <= reasons, (options, said)
        assert guarded.sasa["refusal"].startswith(text) == (ids is refused)


REFUSED: dict[str, dict[str, Any]] = {
    "logprobs": {"logprobs": True, "top_logprobs": 5},
    "JSON": {"response_format": {"type": "json_object"}},
    "choice": {"structured_outputs": {"choice": ["yes", "no"]}},
    "bias": {"logit_bias": {"57": -100, "2068": 100}},
    "words": {"bad_words": ["I", "I'm", " sorry"]},
    "minimum": {"min_tokens": 16},
    "beams": {"use_beam_search": True, "n": 2},
    "answer begun": {"continue_final_message": True, "add_generation_prompt": False},
    "prompt_logprobs": {"prompt_logprobs": 2},
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_or_an_error(server: Server, guarded: Model, name: str) -> None:
    prompt = guarded.some(refused=True)[0]
    body = {"messages": messages(prompt, guarded.folder), "max_tokens": 16, "temperature": 0.0, **REFUSED[name]}
    if name == "answer begun":
        body["messages"] = [*body["messages"], {"role": "assistant", "content": "Sure, here is"}]
    status, said = server.ask("/v1/chat/completions", body)
    if status == 200:
        for choice in said["choices"]:
            if choice["finish_reason"] != "error":
                assert choice["finish_reason"] == "content_filter"
                assert choice["message"]["content"] == guarded.sasa["refusal"]
    else:
        assert status in (400, 500), said


def test_echo(server: Server, guarded: Model) -> None:
    prompt = next(prompt for prompt in guarded.some(refused=True) if prompt["text"] and not prompt["picture"])
    body = {"prompt": prompt["ids"], "max_tokens": 16, "temperature": 0, "echo": True, "logprobs": 2}
    status, said = server.ask("/v1/completions", body)
    assert status == 400 and "prompt_logprobs" in str(said)


def test_errors_say_why(server: Server, guarded: Model) -> None:
    allowed = guarded.some(refused=False)[0]
    begun = [*messages(allowed, guarded.folder), {"role": "assistant", "content": "Sure"}]
    body = {"messages": begun, "continue_final_message": True, "add_generation_prompt": False}
    status, said = server.ask("/v1/chat/completions", body)
    assert status == 400 and "begins the answer" in str(said)


def counts(server: Server) -> dict[str, float]:
    """What /metrics says of the gate."""
    text = server.ask("/metrics")[1]
    assert "vllm:num_requests_running" in text
    return {name: float(value) for name, value in re.findall(r"^(sasa:\w+) (\S+)$", text, re.MULTILINE)}


def test_metrics_and_log(server: Server, guarded: Model) -> None:
    """Counters and a histogram on /metrics; each verdict in the log, with the id that the caller was told."""
    refused, allowed = guarded.some(refused=True)[0], guarded.some(refused=False)[0]
    server.chat(refused, guarded.folder, max_tokens=2)
    before = counts(server)
    names = [server.chat(prompt, guarded.folder, max_tokens=2)[1]["id"] for prompt in (refused, allowed, allowed)]
    after = counts(server)
    grown = {name: after[name] - before[name] for name in after}
    assert grown["sasa:prompts_judged_total"] == 3 and grown["sasa:prompts_refused_total"] == 1
    assert grown["sasa:prompts_would_be_refused_total"] == 0
    assert grown["sasa:unsafe_probability_count"] == 3
    assert grown["sasa:unsafe_probability_sum"] == pytest.approx(
        refused["probability"] + 2 * allowed["probability"], abs=1e-3
    )
    log = server.log.read_text()
    assert f"refused {names[0]}" in log and f"allowed {names[1]}" in log


def test_a_gate_that_observes(guarded: Model, tmp_path: Path) -> None:
    """It answers what it would refuse, and counts and logs it under other names."""
    prompts = [prompt for prompt in guarded.prompts if prompt["text"]]
    refused = sum(prompt["refused"] for prompt in prompts)
    with serving(guarded.edited(tmp_path, gate="observe"), tmp_path / "log") as server:
        said = [server.chat(prompt, guarded.folder, max_tokens=16)[1]["choices"][0] for prompt in prompts]
        counted = counts(server)
    assert guarded.sasa["refusal"] not in [choice["message"]["content"] for choice in said]
    assert "content_filter" not in [choice["finish_reason"] for choice in said]
    assert counted["sasa:prompts_judged_total"] == len(prompts) and 0 < refused < len(prompts)
    assert counted["sasa:prompts_would_be_refused_total"] == refused and counted["sasa:prompts_refused_total"] == 0
    assert (tmp_path / "log").read_text().count("would be refused chatcmpl-") == refused


def test_example(server: Server, guarded: Model) -> None:
    import subprocess
    import sys

    example = Path(__file__).resolve().parents[2] / "examples" / "vllm_openai.py"
    picture = guarded.folder / guarded.some(refused=True)[0]["picture"]
    command = [sys.executable, str(example), "--server", f"{server.address}/v1", "--picture", str(picture)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert guarded.sasa["refusal"] in said.stdout, said.stdout + said.stderr
