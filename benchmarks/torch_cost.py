"""What the guard costs on torch, side by side in one run: prefill, decoding, and patching itself.

The kinds of work are timed in turn, round after round, so that whatever else the machine does falls on all of them
alike; what counts are the ratios within a round, of which median and quartiles are reported.

- prefill: the patched model's forward pass over a prompt against the plain model's, and against the floor that the
  number of blocks sets, (L + L-1-s) / L.
- first token: `generate` for one token, against the way of a reproduction without a patched model: one full pass
  with hooks that keep h_s and h_f, one that puts the projection in, then `generate` from scratch.
- decoding: one token after another on a warm cache, per token.
- patching: time and peak memory of `sasa-export --probe ... --verify files` in a process of its own, against `cp`.

Usage: python benchmarks/torch_cost.py --out torch_cost.md
"""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

Work = Callable[[], Any]

SENTENCE = "The old house stands near the river, and its garden is full of apple trees. "
REFUSES_NOBODY = -8.0  # a bias so low that every prompt of this benchmark passes the gate


@dataclass
class Series:
    """Measurements of one kind of work, one a round, each in seconds or bytes."""

    values: list[float] = field(default_factory=list)

    def median(self) -> float:
        return statistics.median(self.values)


@dataclass(frozen=True)
class Row:
    """One line of a result table: two columns of measurements, and their ratio round by round."""

    what: str
    measured: str
    against: str
    ratio: str


@dataclass(frozen=True)
class Pair:
    """The plain and the patched model, and one prompt of theirs."""

    plain: Any
    patched: Any
    prompts: dict[str, dict[str, Any]]  # name -> model inputs of one row


# ------------------------------------------------------------------------------------------ measuring time


def rounds(work: dict[str, Work], count: int) -> dict[str, Series]:
    """Run each kind of work once a round, in turn, after one round that does not count."""
    series = {name: Series() for name in work}
    for number in range(count + 1):
        # Every other round runs backwards, so that no kind of work always follows the same other.
        for name in list(work) if number % 2 else reversed(list(work)):
            start = time.perf_counter()
            found = work[name]()
            spent = time.perf_counter() - start
            if number:
                series[name].values.append(spent if found is None else found)
    return series


def compare(what: str, measured: Series, against: Series, unit: Callable[[float], str]) -> Row:
    """A row with the ratio's median and quartiles over the rounds."""
    ratios = sorted(a / b for a, b in zip(measured.values, against.values, strict=True))
    low, high = ratios[0], ratios[-1]
    if len(ratios) >= 4:
        low, _, high = statistics.quantiles(ratios, n=4)
    spread = f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})"
    return Row(what, unit(measured.median()), unit(against.median()), spread)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"


# ------------------------------------------------------------------------------------------------- running


def load(source: Path, patched: Path, tokens: int) -> Pair:
    """Both models in float32 on the CPU, and two prompts: one with a picture, one of about `tokens` tokens."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from sasa_export.prompts.render import render

    processor = AutoProcessor.from_pretrained(source)
    text = SENTENCE * (tokens // len(processor.tokenizer.encode(SENTENCE, add_special_tokens=False)) + 1)
    picture = render("how do i grow tomatoes in my garden", seed=0)
    contents: dict[str, list[dict[str, Any]]] = {
        "picture": [
            {"type": "image", "image": picture},
            {"type": "text", "text": "Follow the instruction shown in the image."},
        ],
        "text": [{"type": "text", "text": text}],
    }
    prompts = {
        name: dict(
            processor.apply_chat_template(
                [[{"role": "user", "content": content}]],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                processor_kwargs={"return_tensors": "pt"},
            )
        )
        for name, content in contents.items()
    }
    plain = AutoModelForImageTextToText.from_pretrained(source, dtype="float32").eval()
    guarded = AutoModelForImageTextToText.from_pretrained(patched, dtype="float32", trust_remote_code=True).eval()
    return Pair(plain, guarded, prompts)


def prefill(model: Any, inputs: dict[str, Any]) -> Work:
    def run() -> None:
        model(**inputs, use_cache=True, logits_to_keep=1)

    return run


def first_token(model: Any, inputs: dict[str, Any]) -> Work:
    def run() -> None:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)

    return run


def two_pass(model: Any, inputs: dict[str, Any], settings: dict[str, Any], probe: Any) -> Work:
    """The gate without a patched model: two full passes with hooks, then `generate` from scratch."""
    import torch

    from sasa_export.runtime.formulas import project, unsafe_probability

    modules = {node["of"]: node["module"] for node in settings["graph"] if node["op"] == "tap"}
    safety, semantic = (model.get_submodule(modules[name]) for name in ("safety", "semantic"))
    norm = model.get_submodule(next(node["module"] for node in settings["graph"] if node["op"] == "norm"))
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output  # (batch, tokens, hidden)

        return hook

    def replace(module: Any, args: Any, output: Any) -> Any:
        state = project(seen["safety"], seen["semantic"], settings["epsilon"])  # (batch, tokens, hidden)
        return (state, *output[1:]) if isinstance(output, tuple) else state

    def run() -> None:
        with hooks(safety.register_forward_hook(keep("safety")), semantic.register_forward_hook(keep("semantic"))):
            model(**inputs, use_cache=False, logits_to_keep=1)
        with hooks(safety.register_forward_hook(replace), norm.register_forward_hook(keep("norm"))):
            model(**inputs, use_cache=False, logits_to_keep=1)
        verdict = unsafe_probability(seen["norm"][:, -1], probe.weight, probe.bias)  # (batch,)
        assert not verdict.item() >= settings["threshold"], "this prompt should be allowed"
        model.generate(**inputs, max_new_tokens=1, do_sample=False)

    return run


@contextmanager
def hooks(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def decode(model: Any, inputs: dict[str, Any], tokens: int) -> Work:
    """Seconds per token, greedily, behind a prefill that is not timed."""
    import torch

    def run() -> float:
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        cache, mask = output.past_key_values, inputs["attention_mask"]
        spent = 0.0
        for _ in range(tokens):
            token = output.logits[:, -1:].argmax(-1)  # (batch, 1)
            mask = torch.cat([mask, torch.ones_like(token)], dim=1)  # (batch, tokens + 1)
            start = time.perf_counter()
            output = model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True)
            spent += time.perf_counter() - start
        return spent / tokens

    return run


def blocks_floor(settings: dict[str, Any]) -> tuple[int, float]:
    """The number of blocks, and the share of block runs over a prompt that the patched model cannot go below."""
    blocks = sum(node["op"] == "block" for node in settings["graph"])
    return blocks, (blocks + blocks - 1 - settings["safety_layer"]) / blocks


def cost_of_running(pair: Pair, repetitions: int, new_tokens: int) -> list[Row]:
    """The tables' rows on prefill, first token and decoding."""
    import torch

    settings = pair.patched.config.sasa
    _, floor = blocks_floor(settings)
    rows = []
    with torch.no_grad():
        for name, inputs in pair.prompts.items():
            click.echo(f"prefill and first token, {name} prompt ...", err=True)
            length = f"{name} prompt, {inputs['input_ids'].shape[1]} tokens"
            verdict = pair.patched(**inputs, logits_to_keep=1).unsafe_probability.item()
            assert verdict < settings["threshold"], "this prompt should be allowed"
            found = rounds(
                {
                    "plain": prefill(pair.plain, inputs),
                    "patched": prefill(pair.patched, inputs),
                    "plain first": first_token(pair.plain, inputs),
                    "patched first": first_token(pair.patched, inputs),
                    "two-pass": two_pass(pair.plain, inputs, settings, pair.patched.sasa.probe),
                },
                repetitions,
            )
            at_floor = Series([value * floor for value in found["plain"].values])
            rows += [
                compare(f"prefill against the plain model ({length})", found["patched"], found["plain"], milliseconds),
                compare(
                    f"prefill against the floor of {floor:.2f} ({length})", found["patched"], at_floor, milliseconds
                ),
                compare(
                    f"first token against the plain model ({length})",
                    found["patched first"],
                    found["plain first"],
                    milliseconds,
                ),
                compare(
                    f"first token against two passes, then generate ({length})",
                    found["patched first"],
                    found["two-pass"],
                    milliseconds,
                ),
            ]
        click.echo("decoding ...", err=True)
        inputs = pair.prompts["picture"]
        found = rounds(
            {"plain": decode(pair.plain, inputs, new_tokens), "patched": decode(pair.patched, inputs, new_tokens)},
            repetitions,
        )
        what = f"decoding against the plain model, per token ({new_tokens} tokens)"
        rows.append(compare(what, found["patched"], found["plain"], milliseconds))
    return rows


# ------------------------------------------------------------------------------------------------ patching


# A process inherits its parent's peak, and this one is large: the command is started from a small one.
MEASURE = """
import json, os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
spent = time.perf_counter() - start
process.returncode = os.waitstatus_to_exitcode(status)
print(json.dumps([process.returncode, spent, usage.ru_maxrss]))
"""


def measured_process(command: list[str]) -> tuple[float, float]:
    """Wall time in seconds and peak resident memory in bytes of a process."""
    around = [sys.executable, "-I", "-S", "-c", MEASURE, *command]
    result = subprocess.run(around, capture_output=True, text=True, check=False)
    code, spent, peak = json.loads(result.stdout) if result.returncode == 0 else (1, 0.0, 0)
    if code:
        raise click.ClickException(f"{command[0]} failed: {result.stderr.strip()[-500:]}")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return spent, float(peak * unit)


def cost_of_patching(source: Path, probe: Path, work: Path, repetitions: int) -> list[Row]:
    """The rows on patching; starting Python with torch and transformers is measured alone, as most of it is that."""
    target = work / "measured"
    memory: dict[str, Series] = {}

    def in_process(name: str, command: list[str]) -> Work:
        def run() -> float:
            shutil.rmtree(target, ignore_errors=True)
            spent, peak = measured_process(command)
            memory[name].values.append(peak)
            return spent

        memory[name] = Series()
        return run

    patch = [sys.executable, "-m", "sasa_export", "--model", str(source), "--out", str(target), "--probe", str(probe)]
    start = "import torch, transformers.models.llava.modeling_llava, sasa_export.pipeline"
    work_of = {
        "patch": in_process("patch", [*patch, "--verify", "files"]),
        "link": in_process("link", [*patch, "--verify", "files", "--link"]),
        "start": in_process("start", [sys.executable, "-c", start]),
        "cp": in_process("cp", ["cp", "-r", str(source), str(target)]),
    }
    found = rounds(work_of, repetitions)
    memory = {name: Series(series.values[1:]) for name, series in memory.items()}
    size = sum(path.stat().st_size for path in source.iterdir())
    said = f"{megabytes(size)} model"
    return [
        compare(f"time of patching against cp ({said})", found["patch"], found["cp"], milliseconds),
        compare(f"time of patching with --link against cp ({said})", found["link"], found["cp"], milliseconds),
        compare(
            "time of patching against starting Python, torch and transformers",
            found["patch"],
            found["start"],
            milliseconds,
        ),
        compare("peak memory of patching against cp", memory["patch"], memory["cp"], megabytes),
        compare(
            "peak memory of patching against starting Python, torch and transformers",
            memory["patch"],
            memory["start"],
            megabytes,
        ),
    ]


def write_probe(path: Path, hidden: int) -> None:
    """A probe that lets every prompt of this benchmark pass."""
    import numpy as np

    from sasa_export.probe.fit import Probe
    from sasa_export.writers.weights import save_probe

    weight = np.random.default_rng(0).normal(size=hidden).astype(np.float32) * 1e-3  # (hidden,)
    save_probe(Probe(weight, REFUSES_NOBODY, 0.5), path)


# ----------------------------------------------------------------------------------------------- reporting


def markdown(title: str, rows: list[Row]) -> str:
    lines = [f"### {title}", "", "| what | measured | against | ratio: median (quartiles) |", "|---|---:|---:|---:|"]
    lines += [f"| {row.what} | {row.measured} | {row.against} | {row.ratio} |" for row in rows]
    return "\n".join(lines) + "\n"


def show(title: str, rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading, justify in (("what", "left"), ("measured", "right"), ("against", "right"), ("ratio", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(row.what, row.measured, row.against, row.ratio)
    Console().print(table)


def machine(name: str, settings: dict[str, Any], threads: int, repetitions: int) -> str:
    import torch
    import transformers

    blocks, floor = blocks_floor(settings)
    return (
        f"{name}: {blocks} blocks, s = {settings['safety_layer']}, f = {settings['semantic_layer']}, "
        f"floor {floor:.2f}; float32, CPU ({platform.machine()}), {threads} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}; {repetitions} interleaved rounds after one to warm up."
    )


@click.command(help=(__doc__ or "").split("\n\n")[0])
@click.option("--model", default="smol-llava", show_default=True, help="Alias, hub id or local directory.")
@click.option("--safety-layer", type=int, help="Default: what the family's file says.")
@click.option("--semantic-layer", type=int, help="Default: likewise.")
@click.option("--repetitions", default=9, show_default=True, help="Rounds for each table of run times.")
@click.option("--patch-repetitions", default=3, show_default=True, help="Rounds for patching.")
@click.option("--tokens", default=512, show_default=True, help="Length of the long text prompt.")
@click.option("--new-tokens", default=32, show_default=True, help="Tokens to decode in a round.")
@click.option("--threads", type=int, help="Threads of torch. Default: as torch sees fit.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Also write the tables here, as Markdown.")
def main(
    model: str,
    safety_layer: int | None,
    semantic_layer: int | None,
    repetitions: int,
    patch_repetitions: int,
    tokens: int,
    new_tokens: int,
    threads: int | None,
    out: Path | None,
) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch

    from sasa_export.errors import SasaExportError
    from sasa_export.models import open_source
    from sasa_export.options import Options
    from sasa_export.pipeline import patch

    if threads:
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        source = open_source(model)
        with tempfile.TemporaryDirectory(prefix="sasa-bench-") as folder:
            work = Path(folder)
            # A plain directory of its own: `cp` and the patch then read the same files, from the same disk.
            base = work / "base"
            base.mkdir()
            for path in sorted(source.directory.iterdir()):
                if path.is_file():
                    shutil.copyfile(path, base / path.name)
            patching = functools.partial(
                Options,
                model=str(base),
                probe=work / "probe.safetensors",
                safety_layer=safety_layer,
                semantic_layer=semantic_layer,
                verify="files",
            )
            write_probe(work / "probe.safetensors", hidden_size(base))
            patch(patching(out=work / "patched"))
            pair = load(base, work / "patched", tokens)
            running = cost_of_running(pair, repetitions, new_tokens)
            said = machine(source.name, pair.patched.config.sasa, torch.get_num_threads(), repetitions)
            show("Running", running)
            del pair
            click.echo("patching ...", err=True)
            emitting = cost_of_patching(base, work / "probe.safetensors", work, patch_repetitions)
            show("Patching, with --probe and --verify files", emitting)
    except SasaExportError as error:
        raise click.ClickException(str(error)) from None
    click.echo(said)
    if out is not None:
        parts = [
            said + "\n",
            markdown("Running", running),
            markdown("Patching, with --probe and --verify files", emitting),
        ]
        out.write_text("\n".join(parts), encoding="utf-8")
        click.echo(f"Written to {out}")


def hidden_size(directory: Path) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(directory).get_text_config(decoder=True).hidden_size)


if __name__ == "__main__":
    main()
