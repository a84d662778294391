"""What the benchmarks share: a model beside its guarded version, kinds of work timed in turn, and tables of ratios.

The kinds of work take turns, so that whatever else the machine does falls on all of them alike. What counts are the
ratios within a round, of which median and quartiles are reported.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import torch

from sasa_export.flags import flags, option
from sasa_export.gate import GateSpec
from sasa_export.models import open_source
from sasa_export.models.load import read_sizes
from sasa_export.options import Options
from sasa_export.pipeline import patch
from sasa_export.probe.fit import Probe
from sasa_export.prompts.render import render
from sasa_export.report import quiet
from sasa_export.writers.weights import save_probe

Work = Callable[[], Any]
Row = list[str]

SENTENCE = "The old house stands near the river, and its garden is full of apple trees. "
PICTURED = "how do i grow tomatoes in my garden"
REFUSES_NOBODY = -8.0  # a bias so low that every prompt here passes the gate
TURN = 24  # tokens of a second turn
SHARE = 13 / 32  # of the blocks that lie up to the safety layer: the paper's, of LLaVA-1.5-7B
COLUMNS = ("what", "measured", "against", "ratio: median (quartiles)")


@dataclass(frozen=True)
class Settings:
    """What every benchmark that runs a model lets one set."""

    model: str = option("smol-llava", "Alias, hub id or local directory.")
    safety_layer: int | None = option(None, "Zero-based. Default: what the family's file says.", click.INT)
    semantic_layer: int | None = option(None, "Likewise.", click.INT)
    rounds: int = option(9, "How often each kind of work is timed.", click.INT)
    tokens: int = option(480, "About how long the text prompt is.", click.INT)
    new_tokens: int = option(200, "Tokens to decode.", click.INT)
    threads: int = option(
        1, "Of torch and onnxruntime. With one, the clock counts the processor's time alone.", click.INT
    )
    out: Path | None = option(None, "Also write the tables here, as Markdown.", click.Path(path_type=Path))

    def seconds(self, work: Work) -> float:
        """What some work takes; on one thread the processor's time alone, and not that in which other programs run."""
        now = time.process_time if self.threads == 1 else time.perf_counter
        start = now()
        work()
        return now() - start


@dataclass(frozen=True)
class Pair:
    """A stock model and its guarded version in torch, and two prompts that the gate allows, one row each."""

    plain: Any
    guarded: Any
    text: dict[str, Any]
    picture: dict[str, Any]

    @property
    def blocks(self) -> int:
        return GateSpec.from_json(self.guarded.config.sasa).blocks

    @property
    def settings(self) -> str:
        """Where the gate is, in words."""
        gate = GateSpec.from_json(self.guarded.config.sasa)
        layers = f"safety layer {gate.safety_layer}, semantic layer {gate.semantic_layer}"
        return f"{layers}, second lane over {gate.lane_tokens} tokens"


def make_pair(settings: Settings, work: Path) -> Pair:
    """Patch a model with a random probe, into `work`/patched, and load both of them, float32, on the CPU."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    torch.set_num_threads(settings.threads)
    torch.set_grad_enabled(False)
    source = open_source(settings.model)
    work.mkdir(exist_ok=True)
    probe = write_probe(work / "probe.safetensors", 3 * read_sizes(source).hidden)  # of the lane and of two states
    patch(
        Options(
            model=settings.model, out=work / "patched", probe=probe, verify="files", link=True,
            safety_layer=settings.safety_layer, semantic_layer=settings.semantic_layer,
        )
    )  # fmt: skip
    plain, guarded = (
        AutoModelForImageTextToText.from_pretrained(place, dtype=torch.float32, trust_remote_code=True).eval()
        for place in (source.directory, work / "patched")
    )
    processor = AutoProcessor.from_pretrained(source.directory)
    count = len(processor.tokenizer.encode(SENTENCE, add_special_tokens=False))
    text = _prompt(processor, [{"type": "text", "text": SENTENCE * (settings.tokens // count + 1)}])
    carrier = {"type": "text", "text": "Follow the instruction shown in the image."}
    picture = _prompt(processor, [{"type": "image", "image": render(PICTURED, seed=0)}, carrier])
    return Pair(plain, guarded, text, picture)


def early_layers(pair: Pair, settings: Settings) -> Settings:
    """The same settings with a safety layer as early as the paper's."""
    return replace(settings, safety_layer=round(SHARE * pair.blocks))


def write_probe(path: Path, features: int) -> Path:
    """A probe that lets every prompt of the benchmarks pass."""
    weight = np.random.default_rng(0).normal(size=features).astype(np.float32) * 1e-3  # (features,)
    save_probe(Probe(weight, REFUSES_NOBODY, 0.5), path)
    return path


def _prompt(processor: Any, content: list[dict[str, Any]]) -> dict[str, Any]:
    chats = [[{"role": "user", "content": content}]]
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    return dict(processor.apply_chat_template(chats, **how, processor_kwargs={"return_tensors": "pt"}))


# ------------------------------------------------------------------------------------------- kinds of work


def prefill(model: Any, inputs: dict[str, Any]) -> Work:
    return lambda: model(**inputs, use_cache=True, logits_to_keep=1)


def decoding(model: Any, inputs: dict[str, Any]) -> Work:
    """One token more behind the prompt, each time that it is called."""
    cache = prefill(model, inputs)().past_key_values
    token, mask = inputs["input_ids"][:, -1:], inputs["attention_mask"]  # (1, 1), (1, tokens)

    def work() -> None:
        nonlocal mask
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)  # (1, tokens + 1)
        model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True)

    return work


# ---------------------------------------------------------------------------------------------- measuring


def in_turn(work: dict[str, Any], rounds: int, measure: Callable[[Any], Any]) -> pd.DataFrame:
    """Measure each kind of work once a round, in turn: a row a round, a column a kind."""
    found = []
    for number in range(rounds + 1):
        # Every other round runs backwards, so that no kind of work always follows the same other.
        names = list(work)[:: 1 if number % 2 else -1]
        found.append({name: measure(work[name]) for name in names})
    return pd.DataFrame(found[1:])  # the first one warms up


# ------------------------------------------------------------------------------------------------- tables


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"


def compare(what: str, measured: pd.Series, against: pd.Series, unit: Callable[[float], str] = milliseconds) -> Row:
    """A row of a table: both medians, and the ratio's median and quartiles over the rounds."""
    low, middle, high = (measured / against).quantile([0.25, 0.5, 0.75])
    return [what, unit(measured.median()), unit(against.median()), f"{middle:.3f} ({low:.3f} to {high:.3f})"]


def compare_sizes(what: str, measured: float, against: float) -> Row:
    """A row of two numbers of bytes."""
    return [what, f"{measured:,.0f} bytes", f"{against:,.0f} bytes", f"{measured / against:.4f}"]


def benchmark(title: str) -> Callable[[Callable[[Pair, Settings, Path], dict[str, list[Row]]]], click.Command]:
    """A decorator: a function from a pair, the settings and a scratch directory to tables becomes a command."""

    def decorate(measure: Callable[[Pair, Settings, Path], dict[str, list[Row]]]) -> click.Command:
        @click.command(help=measure.__doc__)
        @flags(Settings)
        def main(**given: Any) -> None:
            quiet()
            settings = Settings(**given)
            with tempfile.TemporaryDirectory(prefix="sasa-bench-") as work:
                pair = make_pair(settings, Path(work))
                tables = measure(pair, settings, Path(work))
            publish(title, describe(pair, settings), tables, settings.out)

        return main

    return decorate


def describe(pair: Pair, settings: Settings) -> str:
    """The model and the machine, in a line."""
    return (
        f"{settings.model}: {pair.blocks} blocks, {pair.settings}, unless a heading says otherwise; float32, CPU "
        f"({platform.machine()}), threads: {settings.threads}; rounds in turn, after one to warm up: {settings.rounds}."
    )


def publish(title: str, about: str, tables: dict[str, list[Row]], out: Path | None) -> None:
    """Print tables of `COLUMNS` by their headings, and write them to a page of Markdown."""
    parts = [f"## {heading}\n\n{markdown(COLUMNS, rows)}" for heading, rows in tables.items()]
    click.echo("\n".join([*parts, about]))
    if out is not None:
        write_page(title, about, parts, out)


def markdown(columns: tuple[str, ...], rows: list[Row]) -> str:
    """A table whose first column is text, and whose others are numbers."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def made_of() -> str:
    """The commit, marked where files have changed since, and the versions of what computes."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    packages = ("sasa-export", "torch", "transformers", "onnxruntime-gpu")
    return f"commit {commit.stdout.strip()}; {', '.join(f'{name} {version(name)}' for name in packages)}"


def write_page(title: str, about: str, parts: list[str], out: Path) -> None:
    """A page of Markdown that says how it was made, of which commit and with which versions."""
    made = f"Made by `python {' '.join(sys.argv)}`, {made_of()}."
    out.write_text("\n".join([f"# {title}\n", f"{made}\n", f"{about}\n", *parts]), encoding="utf-8")
    click.echo(f"Written to {out}")
