"""What a guarded model costs in torch, beside other ways to the same: its first token, and patching itself.

- prefill: the forward pass over a prompt, with a picture and without, against the plain model.
- first token: `generate` for one token, against the way of a reproduction without a patched model: one full pass
  with hooks that keep h_s and h_f, one that puts the projection in, then `generate` from scratch.
- decoding: one token after another on a warm cache.
- patching: time and peak memory of `sasa-export --probe ... --verify files` in a process of its own, against `cp` and
  against starting Python with torch and transformers, which most of it is.

    python benchmarks/torch_cost.py [--out docs/results/cost.md]
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from process import Process, run_process
from side_by_side import Pair, Row, Settings, Work, benchmark, compare, decoding, in_turn, prefill

from sasa_export.models import open_source
from sasa_export.runtime.formulas import project, unsafe_probability

START = "import torch, transformers.models.llava.modeling_llava, sasa_export.pipeline"


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"


def first_token(model: Any, inputs: dict[str, Any]) -> Work:
    return lambda: model.generate(**inputs, max_new_tokens=1, do_sample=False)


def two_passes(pair: Pair, inputs: dict[str, Any]) -> Work:
    """The gate without a patched model: two full passes with hooks, then `generate` from scratch."""
    model, sasa, probe = pair.plain, pair.guarded.config.sasa, pair.guarded.sasa.probe
    paths = {node.get("of", node["op"]): node.get("module") for node in sasa["graph"]}
    safety, semantic, norm = (model.get_submodule(paths[name]) for name in ("safety", "semantic", "norm"))
    seen: dict[Any, torch.Tensor] = {}

    def keep(module: Any, args: Any, output: Any) -> None:
        seen[module] = output[0] if isinstance(output, tuple) else output  # (batch, tokens, hidden)

    def replace(module: Any, args: Any, output: Any) -> Any:
        state = project(seen[safety], seen[semantic], sasa["epsilon"])  # (batch, tokens, hidden)
        return (state, *output[1:]) if isinstance(output, tuple) else state

    def work() -> None:
        with safety.register_forward_hook(keep), semantic.register_forward_hook(keep):
            model(**inputs, use_cache=False, logits_to_keep=1)
        states = [norm(seen[layer][:, -1]) for layer in (safety, semantic)]  # (batch, hidden) each
        with safety.register_forward_hook(replace), norm.register_forward_hook(keep):
            model(**inputs, use_cache=False, logits_to_keep=1)
        read = torch.cat([seen[norm][:, -1], *states], dim=-1)  # (batch, 3 * hidden)
        verdict = unsafe_probability(read, probe.weight, probe.bias)  # (batch,)
        assert verdict.item() < sasa["threshold"], "this prompt should be allowed"
        first_token(model, inputs)()

    return work


def cost_of_running(pair: Pair, settings: Settings) -> list[Row]:
    """The rows on prefill, first token and decoding."""
    rows = []
    for name, inputs in (("picture", pair.picture), ("text", pair.text)):
        work = {
            "plain": prefill(pair.plain, inputs),
            "guarded": prefill(pair.guarded, inputs),
            "plain_first": first_token(pair.plain, inputs),
            "guarded_first": first_token(pair.guarded, inputs),
            "two_passes": two_passes(pair, inputs),
        }
        found = in_turn(work, settings.rounds, settings.seconds)
        prompt = f"{name} prompt, {inputs['input_ids'].shape[1]} tokens"
        for what, measured, against in (
            ("prefill against the plain model", found.guarded, found.plain),
            ("first token against the plain model", found.guarded_first, found.plain_first),
            ("first token against two passes, then generate", found.guarded_first, found.two_passes),
        ):
            rows.append(compare(f"{what} ({prompt})", measured, against))
    steps = {"plain": decoding(pair.plain, pair.picture), "guarded": decoding(pair.guarded, pair.picture)}
    found = in_turn(steps, settings.new_tokens, settings.seconds)
    return [*rows, compare("decoding against the plain model, per token", found.guarded, found.plain)]


def cost_of_patching(settings: Settings, work: Path) -> list[Row]:
    """The rows on patching a copy of the source, so that `cp` and the patch read the same files from the same disk."""
    target, probe = str(work / "measured"), str(work / "probe.safetensors")
    base = shutil.copytree(open_source(settings.model).directory, work / "base")
    patch = [sys.executable, "-m", "sasa_export", "--model", str(base), "--out", target, "--probe", probe]
    for flag, layer in (("--safety-layer", settings.safety_layer), ("--semantic-layer", settings.semantic_layer)):
        patch += [] if layer is None else [flag, str(layer)]
    commands = {
        "patch": [*patch, "--verify", "files"],
        "link": [*patch, "--verify", "files", "--link"],
        "start": [sys.executable, "-c", START],
        "cp": ["cp", "-r", str(base), target],
    }

    def anew(command: list[str]) -> Process:
        shutil.rmtree(target, ignore_errors=True)
        return run_process(command)

    found = in_turn(commands, settings.rounds, anew)
    seconds, memory = found.map(lambda one: one.seconds), found.map(lambda one: one.resident)
    copied = f"cp ({megabytes(sum(path.stat().st_size for path in base.iterdir()))})"
    started = "starting Python, torch and transformers"
    return [
        compare(f"time of patching against {copied}", seconds.patch, seconds.cp),
        compare(f"time of patching with --link against {copied}", seconds.link, seconds.cp),
        compare(f"time of patching against {started}", seconds.patch, seconds.start),
        compare(f"peak memory of patching against {started}", memory.patch, memory.start, megabytes),
    ]


@benchmark("What a guarded model costs")
def main(pair: Pair, settings: Settings, work: Path) -> dict[str, list[Row]]:
    """What a guarded model costs in torch, beside other ways to the same: its first token, and patching itself."""
    running, patching = cost_of_running(pair, settings), cost_of_patching(settings, work)
    return {"Running": running, "Patching, with --probe and --verify files": patching}


if __name__ == "__main__":
    main()
