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

Work = tuple[int, int, int]  # requests at once, and tokens of each prompt and of each answer
Round = dict[str, tuple[list[float], list[int]]]  # by engine: seconds of each step, and how often the lane ran in it

# Rounds of each kind of work in a set of engines. Where an engine lies in memory makes a per cent or two, and stays
# while it runs: hence several sets.
ROUNDS: dict[Work, int] = {(1, 128, 32): 9, (8, 128, 32): 5, (32, 128, 32): 3, (1, 480, 2): 5, (8, 480, 2): 3}
SETS = 3
SAFETY, SEMANTIC = (24, 12), 28  # smol-llava's own safety layer, and one at the paper's share of blocks, 13 of 32
CACHE = 1 << 29  # bytes
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip
TESTS = Path(__file__).resolve().parents[1] / "serving" / "tests"
HEAD = f"""\
# What the gate costs on vLLM

smol-llava, 30 blocks, in float32 on a CPU, one thread, no prefix cache, eager. A stock engine, a second one, and two
guarded ones run in one process and take turns step by step: all prompts of a round run in the first step, and the
others decode. What counts is the processor's time, and the ratio to the stock engine within a round. There are
{SETS * min(ROUNDS.values())} to {SETS * max(ROUNDS.values())} rounds, in {SETS} processes. `make bench-vllm` wrote it.
"""
COLUMNS = "| | requests at once | stock, a second | this, a second | ratio: median (quartiles) |\n"
COLUMNS += "| --- |" + " ---: |" * 4 + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what the gate costs on vLLM.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--make", action="store_true", help="patch the model, and measure nothing")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.make:
        return make(given.folder)
    rounds: dict[Work, list[Round]] = {work: [] for work in ROUNDS}
    for _ in range(SETS):
        cache, found = in_process(given.folder)
        for work, more in zip(ROUNDS, found, strict=True):
            rounds[work] += more
    text = page(given.folder, rounds, cache, in_process(given.folder, "--v2")[1][0][0])
    print(text)
    if given.out:
        given.out.write_text(text, encoding="utf-8")


def patched(folder: Path, layer: int) -> Path:
    return folder / f"patched-{layer}"


def make(folder: Path) -> None:
    """Patch `stock/` at each safety layer, with a probe that reads the lane and two states, as the tool's own do."""
    from side_by_side import write_probe

    from sasa_export.models import open_source
    from sasa_export.models.load import read_sizes
    from sasa_export.options import Options
    from sasa_export.pipeline import patch

    stock = str(folder / "stock")
    probe = write_probe(folder / "cost.safetensors", 3 * read_sizes(open_source(stock)).hidden)
    given: dict[str, Any] = {"model": stock, "probe": probe, "semantic_layer": SEMANTIC, "lane_tokens": 8}
    for layer in SAFETY:
        if not patched(folder, layer).exists():
            patch(Options(out=patched(folder, layer), safety_layer=layer, verify="files", link=True, **given))


# ------------------------------------------------------------------------------------------------ measuring


def in_process(folder: Path, *options: str) -> Any:
    """What `measure` says in a process of its own."""
    command = [sys.executable, __file__, "--measure", str(folder), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **SETTINGS}, check=True)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("SAID "))[5:])


def measure(folder: Path, *, v2: bool) -> Any:
    """The bytes of keys and values of a token in each engine, and the rounds of each kind of work. By Model Runner V2 a
    single one: its times mean nothing here."""
    if v2:
        sys.path.insert(0, str(TESTS))
        import v2_on_cpu  # type: ignore[import-not-found]  # noqa: F401
    from sasa_vllm import lane, metrics, worker

    ran, judge = [0], lane.Lane.judge

    def counted(*given: Any) -> Any:
        ran[0] += 1
        return judge(*given)

    lane.Lane.judge = counted  # type: ignore[method-assign, assignment]
    # Two guarded models of one process cannot both report on /metrics.
    worker.Metrics = lambda reporting: metrics.Metrics(reporting=False)  # type: ignore[assignment,misc]
    models = {str(layer): patched(folder, layer) for layer in SAFETY}
    models = models if v2 else {"stock": folder / "stock", "again": folder / "stock", **models}
    engines = {kind: start(model) for kind, model in models.items()}
    cache = {kind: one.vllm_config.cache_config.num_gpu_blocks for kind, one in engines.items()}
    works = {(8, 128, 32): 1} if v2 else ROUNDS
    rounds = [[play(engines, ran, work, turn) for turn in range(count + 1)][1:] for work, count in works.items()]
    return {kind: CACHE / (blocks * 32) for kind, blocks in cache.items()}, rounds


def start(model: Path) -> Any:
    from vllm import LLM

    llm = LLM(
        str(model), dtype="float32", enforce_eager=True, max_model_len=512, block_size=32, max_num_seqs=32,
        max_num_batched_tokens=4096, kv_cache_memory_bytes=CACHE, enable_prefix_caching=False,
    )  # fmt: skip
    return llm.llm_engine


def play(engines: dict[str, Any], ran: list[int], work: Work, turn: int) -> Round:
    """A round: every engine answers the same requests, one step each in turn."""
    from vllm import SamplingParams

    requests, tokens, answer = work
    params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
    for number in range(requests):
        prompt = {"prompt_token_ids": [1000 + (number * 7 + place) % 20000 for place in range(tokens)]}
        for engine in engines.values():
            engine.add_request(f"{work} {turn} {number}", prompt, params)
    found: Round = {kind: ([], []) for kind in engines}
    kinds = list(engines)
    for step in range(answer):
        first = (turn + step) % len(kinds)  # so that no engine always follows the same other at the same step
        for kind in (kinds[first:] + kinds[:first])[:: 1 if step % 2 else -1]:
            before, begin = ran[0], time.process_time()
            engines[kind].step()
            found[kind][0].append(time.process_time() - begin)
            found[kind][1].append(ran[0] - before)
    assert not any(engine.has_unfinished_requests() for engine in engines.values()), "prompts took several steps"
    return found


# ------------------------------------------------------------------------------------------------- the page


def page(folder: Path, rounds: dict[Work, list[Round]], cache: dict[str, float], v2: Round) -> str:
    import vllm  # whose package has other names for some devices

    parts = [HEAD, f"## The second stock engine: how far ratios are to be trusted\n\n{table(rounds, 'again')}"]
    for layer in SAFETY:
        about = f"## Safety layer {layer}, semantic layer {SEMANTIC}\n\n{passes(patched(folder, layer))}\n\n"
        parts.append(about + table(rounds, str(layer)))
    guarded = [str(layer) for layer in SAFETY]
    for found in (one for each in [*rounds.values(), [v2]] for one in each):
        assert all(sum(found[kind][1]) == found[kind][1][0] == 1 for kind in guarded), "the lane ran in other steps"
    same = " and ".join({f"{size:.0f}" for size in cache.values()})
    versions = ", ".join(f"{name} {version(name)}" for name in ("sasa-vllm", "torch", "transformers"))
    parts.append(
        f"Keys and values of a token of any of these models: {same} bytes.\n\n"
        "The lane ran in the first step of a round and in no other, by Model Runner V1, whose times these are, and by "
        "V2. On a CPU the\nkernels of V2 run in Triton's interpreter, and its times would say nothing.\n\n"
        f"Made with vllm {vllm.__version__}, {versions}.\n"
    )
    return "\n".join(parts)


def passes(model: Path) -> str:
    """What the second lane is, and its block passes over a prompt."""
    graph = json.loads((model / "config.json").read_text())["sasa"]["graph"]
    blocks, again = (sum(node["op"] == op for node in graph) for op in ("block", "lane_block"))
    tokens = next(node["tokens"] for node in graph if node["op"] == "projection")
    short, long = (1 + again * tokens / (blocks * length) for length in (128, 480))
    return (
        f"{again} of {blocks} blocks run once more over the last {tokens} tokens of a prompt: {short:.3f} times the "
        f"block passes of one\nof 128 tokens, {long:.3f} of one of 480. A decoded token has the stock model's."
    )


def table(rounds: dict[Work, list[Round]], kind: str) -> str:
    """A row for each kind of work: tokens a second of stock and of another, and the ratio of times within a round."""
    rows = []
    for what, first, last in (("prompts of {} tokens", 0, 1), ("decoded behind {} tokens", 1, None)):
        for (requests, tokens, answer), found in rounds.items():
            if first < answer - 1:
                stock, other = ([sum(one[each][0][first:last]) for one in found] for each in ("stock", kind))
                count = requests * (answer - 1 if first else tokens)
                speeds = " | ".join(f"{count / statistics.median(each):.0f}" for each in (stock, other))
                ratios = [mine / theirs for mine, theirs in zip(other, stock, strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
                rows.append(f"{what.format(tokens)} | {requests} | {speeds} | {middle:.3f} ({low:.3f} to {high:.3f})")
    return COLUMNS + "".join(f"| {row} |\n" for row in rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print("SAID", json.dumps(measure(Path(sys.argv[2]), v2="--v2" in sys.argv)), flush=True)
    else:
        main()
