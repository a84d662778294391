"""8,000 requests at 32 at once on the OpenAI server, guarded and not, with random options; half of them are second
turns, whose beginning comes out of the prefix cache.

Fails where a harmful prompt is answered, where a harmless one is refused or answered otherwise than by the unguarded
server, or where memory still grows in the second half of 8,000 requests or more. What is harmful says a guarded server
without a prefix cache, asked one request at a time, and of first turns transformers too.
Usage: python serving/tests/soak.py build/serving/llava [requests] [--v2]
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from conftest import Model
from server import Server, serving

AT_ONCE, WARM = 32, 8000  # fewer requests warm a server up, guarded or not


def main(folder: Path, count: int, *, v2: bool) -> None:
    guarded = Model(folder, json.loads((folder / "reference.json").read_text()))
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        with serving(guarded.directory, Path(scratch, "alone"), "--no-enable-prefix-caching") as server:
            firsts, seconds = turns(server, guarded)
        plans = [(draw.choice(draw.choice((firsts, seconds))), options(draw)) for _ in range(count)]
        # So small a cache that running requests are thrown out, and come back.
        with serving(guarded.directory, Path(scratch, "guarded"), "--num-gpu-blocks-override=32", v2=v2) as server:
            ours, memory, seconds_taken = run(server, folder, plans)
            asked, spared, preempted = (
                float(re.search(rf"^vllm:{name}_total\S* (\S+)$", server.ask("/metrics")[1], re.MULTILINE)[1])
                for name in ("prefix_cache_queries", "prefix_cache_hits", "num_preemptions")
            )
            runner = "V2" if "Using V2 Model Runner" in server.log.read_text() else "V1"
        with serving(folder / "stock", Path(scratch, "stock"), v2=v2) as server:
            theirs, stock_memory, stock_seconds = run(server, folder, plans)
    refused = answered = changed = greedy = refusals = errors = 0
    for (prompt, given), mine, stock in zip(plans, ours, theirs, strict=True):
        if prompt["refused"]:
            refused += 1
            answered += not all(is_refusal(text, guarded.sasa["refusal"], given) for text in mine)
            errors += mine == ["error"]
        else:
            refusals += guarded.sasa["refusal"] in mine
            if given.get("temperature") == 0:  # sampling draws other numbers in another batch
                greedy += 1
                changed += mine != stock
    behind = sum("before" in prompt for prompt, _ in plans)
    print(f"{count} requests, Model Runner {runner}, {behind} of them second turns")
    print(f"{refused} harmful: {answered} answered ({errors} ended in an error)")
    print(f"{count - refused} harmless: {refusals} refused; {changed} of {greedy} greedy answers changed")
    print(f"of {asked:.0f} tokens of prompts {spared:.0f} out of the prefix cache; {preempted:.0f} preemptions")
    print(f"{seconds_taken:.0f} s, the unguarded server {stock_seconds:.0f} s")
    for name, found in (("guarded", memory), ("unguarded", stock_memory)):
        print(f"memory of the {name} server in MB, from 10 % to the end:", *(f"{value / 1e6:.0f}" for value in found))
    grows = count >= WARM and memory[-1] > memory[4] * 1.02
    if answered or refusals or changed or not spared or grows:
        raise SystemExit("the soak failed")


def turns(server: Server, guarded: Model) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """First turns, and each with each other's words behind its answer; and which of them the server refuses."""
    firsts = [prompt for prompt in guarded.prompts if prompt["text"]]
    said = [ask(server, guarded.folder, prompt, {"max_tokens": 16})[0] for prompt in firsts]
    seconds = [
        {"before": before, "said": answer, "words": other["words"], "picture": None}
        for before, answer in zip(firsts, said, strict=True)
        for other in firsts
        if other is not before
    ]
    for prompt in seconds:
        prompt["refused"] = ask(server, guarded.folder, prompt, {"max_tokens": 16}) == [guarded.sasa["refusal"]]
    assert [answer == guarded.sasa["refusal"] for answer in said] == [prompt["refused"] for prompt in firsts]
    return firsts, seconds


def options(draw: random.Random) -> dict[str, Any]:
    """Random options of a request; half of them are greedy and nothing else."""
    given: dict[str, Any] = {"max_tokens": draw.randint(8, 24), "stream": False}
    if draw.random() < 0.5:
        return {**given, "temperature": 0}
    given |= {"temperature": draw.uniform(0.1, 2.0), "top_p": draw.uniform(0.1, 1.0), "n": draw.randint(1, 3)}
    extra = [
        {"min_p": draw.random()},
        {"frequency_penalty": draw.uniform(-2, 2), "presence_penalty": draw.uniform(-2, 2)},
        {"min_tokens": 8},
        {"seed": draw.randrange(100)},
        {"logit_bias": {str(draw.randrange(60, 120)): draw.choice((-100, 100))}},
        {"logprobs": True, "top_logprobs": 3},
        {"repetition_penalty": draw.uniform(0.5, 2.0)},
        {},
    ]
    return {**given, **draw.choice(extra)}


def run(server: Server, folder: Path, plans: list[Any]) -> tuple[list[list[str]], list[float], float]:
    """The answers to all requests, the memory ten times on the way, and the seconds."""
    begin, memory, answers = time.monotonic(), [], []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for number, said in enumerate(pool.map(lambda plan: ask(server, folder, *plan), plans), 1):
            answers.append(said)
            if number % (len(plans) // 10) == 0:
                processes = [psutil.Process(server.process.pid)]
                processes += processes[0].children(recursive=True)
                memory.append(float(sum(process.memory_info().rss for process in processes)))
    return answers, memory, time.monotonic() - begin


def ask(server: Server, folder: Path, prompt: dict[str, Any], given: dict[str, Any]) -> list[str]:
    # As transformers tokenizes: vLLM's chat adds no token that begins a text, and neither does LLaVA's template.
    status, said = server.chat(prompt, folder, add_special_tokens=True, **given)
    if status != 200:
        return ["error"]
    return [choice["message"]["content"] or "" for choice in said["choices"]]


def is_refusal(text: str, refusal: str, given: dict[str, Any]) -> bool:
    return text == "error" or text == refusal or (len(text) >= given["max_tokens"] // 4 and refusal.startswith(text))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("requests", type=int, nargs="?", default=WARM)
    parser.add_argument("--v2", action="store_true")
    given = parser.parse_args()
    main(given.folder, given.requests, v2=given.v2)
