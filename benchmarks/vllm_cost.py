"""What the gate costs on vLLM: the guarded model beside the stock model, in one run on one machine.

Usage: python benchmarks/vllm_cost.py FOLDER [--out FILE.md]. FOLDER holds `stock/` and `patched/`, as
serving/tests/reference.py writes them; the environment is that of `make test-vllm`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

PROMPT, ANSWER, REPEATS = 128, 16, 3  # tokens, tokens, and how often each is measured
AT_ONCE = (1, 8, 32)
SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what the gate costs on vLLM.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    kinds = ("stock", "patched")
    engines = {kind: Engine(given.folder / kind) for kind in kinds}
    seconds: dict[tuple[str, int, int], list[float]] = {}
    for kind in kinds:
        engines[kind].ask(1, 2)  # a warm-up
    for requests in AT_ONCE:
        for tokens in (1, ANSWER):
            for _ in range(REPEATS):
                for kind in kinds:  # in turn, so that whatever else the machine does meets both
                    seconds.setdefault((kind, requests, tokens), []).append(engines[kind].ask(requests, tokens))
    found = {key: statistics.median(values) for key, values in seconds.items()}
    text = table(found, {kind: engine.cache for kind, engine in engines.items()}, lane(given.folder / "patched"))
    print(text)
    if given.out:
        given.out.write_text(text, encoding="utf-8")


class Engine:
    """An engine in a process of its own, which answers over pipes."""

    def __init__(self, model: Path) -> None:
        command = [sys.executable, __file__, "--engine", str(model)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **SETTINGS}
        )
        self.cache = self.said()

    def ask(self, requests: int, tokens: int) -> float:
        """The seconds that so many requests at once take, each with an answer of so many tokens."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([requests, tokens]) + "\n")
        self.process.stdin.flush()
        return self.said()

    def said(self) -> float:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("SAID "):
                return float(line[5:])
        raise SystemExit("an engine ended early; run it alone to see why")


def engine(model: str) -> None:
    """What a process of an Engine does."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model, dtype="float32", enforce_eager=True, max_model_len=512, block_size=32, max_num_seqs=32,
        kv_cache_memory_bytes=1 << 30, enable_prefix_caching=False,
    )  # fmt: skip
    cache = llm.llm_engine.vllm_config.cache_config
    blocks = cache.num_gpu_blocks or 1
    print("SAID", (1 << 30) / (blocks * 32), flush=True)  # bytes of keys and values a token
    for line in sys.stdin:
        requests, tokens = json.loads(line)
        prompts: list[Any] = [
            {"prompt_token_ids": [1000 + (number * 7 + place) % 20000 for place in range(PROMPT)]}
            for number in range(requests)
        ]
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        begin = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        print("SAID", time.perf_counter() - begin, flush=True)


def lane(patched: Path) -> str:
    """What the second lane is, and its block passes over a prompt."""
    graph = json.loads((patched / "config.json").read_text())["sasa"]["graph"]
    blocks, again = (sum(node["op"] == op for node in graph) for op in ("block", "lane_block"))
    tokens = next(node["tokens"] for node in graph if node["op"] == "projection")
    times = 1 + again * tokens / (blocks * PROMPT)
    return (
        f"{again} of {blocks} blocks run once more, over the last {tokens} tokens of a prompt: {times:.3f} times the "
        "original's block passes\nover the prompt, and as many over decoded tokens."
    )


def table(found: dict[tuple[str, int, int], float], cache: dict[str, float], passes: str) -> str:
    rows = []
    for requests in AT_ONCE:
        speeds = {}
        for kind in ("stock", "patched"):
            short, long = found[kind, requests, 1], found[kind, requests, ANSWER]
            speeds[kind] = requests * PROMPT / short, requests * (ANSWER - 1) / max(long - short, 1e-9)
        for index, what in enumerate(("prompt", "decoded")):
            stock, patched = speeds["stock"][index], speeds["patched"][index]
            rows.append(f"| {what} | {requests} | {stock:.0f} | {patched:.0f} | {stock / patched:.2f} |")
    ratio = cache["patched"] / cache["stock"]
    import vllm  # whose package has other names for some devices

    versions = ", ".join(f"{name} {version(name)}" for name in ("sasa-vllm", "torch", "transformers"))
    return (
        "# What the gate costs on vLLM\n\n"
        f"smol-llava in float32 on a CPU, one thread, prompts of {PROMPT} tokens and answers of {ANSWER}, no prefix "
        f"cache;\nmedians of {REPEATS}, both engines in turn. Written by `make bench-vllm`.\n\n"
        "| tokens | requests at once | stock, a second | guarded, a second | ratio |\n|---|---|---|---|---|\n"
        + "\n".join(rows)
        + f"\n\n{passes}\nKeys and values of a token: {cache['stock']:.0f} and {cache['patched']:.0f} bytes, "
        f"{ratio:.2f} times.\n\n"
        f"Made with vllm {vllm.__version__}, {versions}.\n"
    )


if __name__ == "__main__":
    engine(sys.argv[2]) if sys.argv[1:2] == ["--engine"] else main()
