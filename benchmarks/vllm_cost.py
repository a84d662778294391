"""What the gate costs on vLLM: guarded models beside the stock model, in turn on one machine.

Usage: python benchmarks/vllm_cost.py FOLDER --make, in the environment of sasa-export, and then
python benchmarks/vllm_cost.py FOLDER [--out FILE.md], in that of `make test-vllm`. FOLDER holds `stock/`, smol-llava as
serving/tests/reference.py writes it.
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

PROMPT, ANSWER, CACHE = 128, 32, 1 << 30  # tokens, tokens, bytes
ROUNDS = {1: 31, 8: 15, 32: 9}  # by requests at once
SAFETY, SEMANTIC = (24, 12), 28  # smol-llava's own safety layer, and one at the paper's share of blocks, 13 of 32
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip
TESTS = Path(__file__).resolve().parents[1] / "serving" / "tests"
HEAD = f"""\
# What the gate costs on vLLM

smol-llava, 30 blocks, in float32 on a CPU, one thread, prompts of {PROMPT} tokens and answers of {ANSWER}, no prefix
cache, eager. Time of the processor: all prompts of a round run in its first step, and the others decode. The engines
take turns, {", ".join(f"{rounds} rounds at {requests}" for requests, rounds in ROUNDS.items())} at once, after one to
warm up; a ratio is that of two engines within a round. Written by `make bench-vllm`.
"""
COLUMNS = "| | requests at once | stock | guarded | ratio: median (quartiles) |\n| --- | ---: | ---: | ---: | ---: |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what the gate costs on vLLM.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--make", action="store_true", help="patch the model, and measure nothing")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.make:
        return make(given.folder)
    models = {"stock": given.folder / "stock", **{str(layer): patched(given.folder, layer) for layer in SAFETY}}
    engines = {kind: Engine(model) for kind, model in models.items()}
    found: dict[str, dict[int, list[Any]]] = {kind: {} for kind in models}
    for requests, rounds in ROUNDS.items():
        for number in range(rounds + 1):
            # Every other round runs backwards, so that no engine always follows the same other.
            for kind in list(models)[:: 1 if number % 2 else -1]:
                found[kind].setdefault(requests, []).append(engines[kind].ask(requests))
    for engine in engines.values():
        engine.process.kill()
    other = Engine(models[str(SAFETY[-1])], v2=True)
    text = page(found, {kind: engine.cache for kind, engine in engines.items()}, models, other.ask(8))
    other.process.kill()
    print(text)
    if given.out:
        given.out.write_text(text, encoding="utf-8")


def patched(folder: Path, layer: int) -> Path:
    return folder / f"patched-{layer}"


def make(folder: Path) -> None:
    from side_by_side import write_probe

    from sasa_export.models import open_source
    from sasa_export.models.load import read_sizes
    from sasa_export.options import Options
    from sasa_export.pipeline import patch

    stock = str(folder / "stock")
    probe = write_probe(folder / "cost.safetensors", 3 * read_sizes(open_source(stock)).hidden)  # lane and two states
    given: dict[str, Any] = {"model": stock, "probe": probe, "semantic_layer": SEMANTIC, "lane_tokens": 8}
    for layer in SAFETY:
        if not patched(folder, layer).exists():
            patch(Options(out=patched(folder, layer), safety_layer=layer, verify="files", link=True, **given))


class Engine:
    """An engine in a process of its own, which answers over pipes."""

    def __init__(self, model: Path, *, v2: bool = False) -> None:
        command = [sys.executable, __file__, "--engine", str(model), *["--v2"] * v2]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **SETTINGS}
        )
        self.cache: float = self.said()

    def ask(self, requests: int) -> dict[str, float]:
        """What so many requests at once take: seconds of the prompts and of the other steps, steps, and in how many the
        lane ran."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{requests}\n")
        self.process.stdin.flush()
        return self.said()

    def said(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("SAID "):
                return json.loads(line[5:])
        raise SystemExit("an engine ended early; run it alone to see why")


def engine(model: str, *, v2: bool) -> None:
    """What a process of an Engine does."""
    if v2:
        sys.path.insert(0, str(TESTS))
        import v2_on_cpu  # type: ignore[import-not-found]  # noqa: F401
    from sasa_vllm.lane import Lane
    from vllm import LLM

    judged, judge = [0], Lane.judge

    def counted(lane: Any, tails: Any) -> Any:
        judged[0] += 1
        return judge(lane, tails)

    Lane.judge = counted  # type: ignore[method-assign, assignment]
    llm = LLM(
        model, dtype="float32", enforce_eager=True, max_model_len=512, block_size=32, max_num_seqs=32,
        max_num_batched_tokens=32 * PROMPT, kv_cache_memory_bytes=CACHE, enable_prefix_caching=False,
    )  # fmt: skip
    blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks or 1
    print("SAID", CACHE / (blocks * 32), flush=True)  # bytes of keys and values a token
    for line in sys.stdin:
        judged[0] = 0
        seconds = steps(llm, int(line))
        assert len(seconds) == ANSWER, "the prompts did not fit in one step"
        told = {"prompt": seconds[0], "decoded": sum(seconds[1:]), "steps": len(seconds), "lane": judged[0]}
        print("SAID", json.dumps(told), flush=True)


def steps(llm: Any, requests: int) -> list[float]:
    """The seconds of each step in which an engine answers so many requests."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
    for number in range(requests):
        prompt = [1000 + (number * 7 + place) % 20000 for place in range(PROMPT)]
        llm.llm_engine.add_request(str(next(llm.request_counter)), {"prompt_token_ids": prompt}, params)
    seconds = []
    while llm.llm_engine.has_unfinished_requests():
        begin = time.process_time()
        llm.llm_engine.step()
        seconds.append(time.process_time() - begin)
    return seconds


def page(found: dict[str, Any], cache: dict[str, float], models: dict[str, Path], other: dict[str, float]) -> str:
    import vllm  # whose package has other names for some devices

    parts = [HEAD]
    for layer in SAFETY:
        rows = [
            compare(what, requests, found["stock"][requests][1:], found[str(layer)][requests][1:])
            for what in ("prompt", "decoded")
            for requests in ROUNDS
        ]
        parts.append(f"## Safety layer {layer}, semantic layer {SEMANTIC}\n\n{passes(models[str(layer)])}\n")
        parts.append(COLUMNS + "".join(rows))
    lanes = {(one["lane"], one["steps"]) for asked in found[str(SAFETY[-1])].values() for one in asked}
    (ran, of), *more = lanes
    assert not more
    same = " and ".join({f"{cache[kind]:.0f}" for kind in models})
    versions = ", ".join(f"{name} {version(name)}" for name in ("sasa-vllm", "torch", "transformers"))
    parts.append(
        f"Keys and values of a token of any of the three: {same} bytes.\n\n"
        f"The lane ran in {ran} of {of} steps. These are times of Model Runner V1. Those of V2 on a CPU, whose kernels "
        "run in Triton's\ninterpreter, would say nothing; there, the lane ran in "
        f"{other['lane']} of {other['steps']} steps.\n\n"
        f"Made with vllm {vllm.__version__}, {versions}.\n"
    )
    return "\n".join(parts)


def passes(model: Path) -> str:
    """What the second lane is, and its block passes over a prompt."""
    graph = json.loads((model / "config.json").read_text())["sasa"]["graph"]
    blocks, again = (sum(node["op"] == op for node in graph) for op in ("block", "lane_block"))
    tokens = next(node["tokens"] for node in graph if node["op"] == "projection")
    times = 1 + again * tokens / (blocks * PROMPT)
    return (
        f"{again} of {blocks} blocks run once more over the last {tokens} tokens of a prompt: {times:.3f} times the "
        "block passes of the\nprompt, and as many as the stock model's over decoded tokens."
    )


def compare(what: str, requests: int, stock: list[Any], guarded: list[Any]) -> str:
    """A row: tokens a second of both, and the ratio of times within a round."""
    tokens = requests * (PROMPT if what == "prompt" else ANSWER - 1)
    speeds = [tokens / statistics.median(one[what] for one in each) for each in (stock, guarded)]
    ratios = [mine[what] / theirs[what] for mine, theirs in zip(guarded, stock, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    both = " | ".join(f"{speed:.0f} a second" for speed in speeds)
    return f"| {what} tokens | {requests} | {both} | {middle:.3f} ({low:.3f} to {high:.3f}) |\n"


if __name__ == "__main__":
    engine(sys.argv[2], v2="--v2" in sys.argv) if sys.argv[1:2] == ["--engine"] else main()
