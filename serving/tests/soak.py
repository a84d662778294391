"""2,000 requests at 32 at once on the OpenAI server, guarded and not, with random options.

Fails where a harmful prompt is answered, where a harmless one is answered otherwise than by the unguarded server, or
where memory still grows in the second half. Usage: python serving/tests/soak.py build/serving/llava [requests]
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from conftest import Model
from server import Server, serving

AT_ONCE = 32


def main(folder: Path, count: int) -> None:
    guarded = Model(folder, json.loads((folder / "reference.json").read_text()))
    prompts = [prompt for prompt in guarded.prompts if prompt["text"]]
    draw = random.Random(0)
    plans = [(draw.choice(prompts), options(draw)) for _ in range(count)]
    with tempfile.TemporaryDirectory() as scratch:
        with serving(guarded.directory, Path(scratch, "guarded")) as server:
            ours, memory, seconds = run(server, folder, plans)
        with serving(folder / "stock", Path(scratch, "stock")) as server:
            theirs, stock_memory, stock_seconds = run(server, folder, plans)
    refused = answered = changed = errors = 0
    for (prompt, given), mine, stock in zip(plans, ours, theirs, strict=True):
        if prompt["refused"]:
            refused += 1
            answered += not all(is_refusal(text, guarded.sasa["refusal"], given) for text in mine)
            errors += mine == ["error"]
        elif given.get("temperature") == 0:  # sampling draws other numbers in another batch
            changed += mine != stock
    print(f"{count} requests, {refused} harmful: {answered} answered ({errors} ended in an error), {changed} changed")
    print(f"{seconds:.0f} s, the unguarded server {stock_seconds:.0f} s")
    for name, found in (("guarded", memory), ("unguarded", stock_memory)):
        print(f"memory of the {name} server in MB, from 10 % to the end:", *(f"{value / 1e6:.0f}" for value in found))
    if answered or changed or memory[-1] > memory[4] * 1.02:
        raise SystemExit("the soak failed")


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
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2000)
