"""What the guard costs in ONNX on a CPU, side by side in one run.

The patched graphs are compared with a plain export of the same model by the same code without the passes, with the
patched model in torch, and with the way without a patched model: two full passes with hooks for the verdict, then
`generate` from scratch, in torch. All kinds of work take turns within a round, and decoding takes turns step by
step, so that whatever else the machine does falls on all alike. Ratios are of neighbours in time. With one thread
the clock counts the processor's time alone, and not that in which other programs run.

    python benchmarks/onnx_cost.py [--model smol-llava] [--repetitions 9] [--out docs/onnx-cost.md]
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from torch_cost import (
    Row,
    Series,
    Work,
    blocks_floor,
    first_token,
    hidden_size,
    load,
    machine,
    markdown,
    megabytes,
    milliseconds,
    prefill,
    rounds,
    show,
    two_pass,
    write_probe,
)

PLAIN, GUARDED, EVERY = "plain", "guarded", "every"  # the graphs; the last one judges every token
Clock = Callable[[], float]


class Session:
    """A decoder that is fed embeddings; times in seconds."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        self.clock = clock_for(threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.empty = {
            value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
            for value in self.session.get_inputs()
            if value.name.startswith("past_key_values.")
        }
        self.token_bytes = 4 * sum(int(array.shape[1] * array.shape[3]) for array in self.empty.values())
        self.names = [value.name for value in self.session.get_outputs()]
        axes = {value.name: len(value.shape) for value in self.session.get_inputs()}["position_ids"]
        self.position_shape = (3, 1) if axes == 3 else (1,)

    def call(self, embeds: np.ndarray, cache: dict[str, Any], start: int) -> tuple[float, dict[str, Any]]:
        """Feed embeddings (1, tokens, hidden) behind `start` tokens: the seconds, and the cache after it."""
        count = embeds.shape[1]
        positions = np.broadcast_to(np.arange(start, start + count), (*self.position_shape, count))
        feed = {
            "inputs_embeds": embeds,
            "attention_mask": np.ones((1, start + count), np.int64),
            "position_ids": np.ascontiguousarray(positions),
            **cache,
        }
        before = self.clock()
        values = self.session.run(None, feed)
        spent = self.clock() - before
        grown = {
            name.replace("present.", "past_key_values."): value
            for name, value in zip(self.names, values, strict=True)
            if name.startswith("present.")
        }
        return spent, grown


class TorchDecoder:
    """The patched model in torch, fed as a Session is."""

    def __init__(self, model: Any, threads: int) -> None:
        self.model = model
        self.empty: dict[str, Any] = {}
        self.clock = clock_for(threads)

    def call(self, embeds: np.ndarray, cache: dict[str, Any], start: int) -> tuple[float, dict[str, Any]]:
        import torch

        mask = torch.ones((1, start + embeds.shape[1]), dtype=torch.int64)
        states = torch.from_numpy(embeds)
        before = self.clock()
        output = self.model(
            inputs_embeds=states, attention_mask=mask, past_key_values=cache.get("past"), use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        return self.clock() - before, {"past": output.past_key_values}


def clock_for(threads: int) -> Clock:
    return time.process_time if threads == 1 else time.perf_counter


def timed(work: Work, clock: Clock) -> Work:
    """The same work, giving its seconds by a clock."""

    def run() -> float:
        before = clock()
        work()
        return clock() - before

    return run


def prompt_of(session: Session, embeds: np.ndarray) -> Work:
    """Seconds of a prompt (1, tokens, hidden) on an empty cache."""
    return lambda: session.call(embeds, session.empty, 0)[0]


def decode_in_turn(sessions: dict[str, Any], embeds: np.ndarray, steps: int) -> dict[str, Series]:
    """Seconds of each step behind one prompt, the sessions taking turns at every step, in alternating order."""
    caches = {name: session.call(embeds, session.empty, 0)[1] for name, session in sessions.items()}
    found = {name: Series() for name in sessions}
    for step in range(steps + 1):
        for name in sorted(sessions, reverse=bool(step % 2)):
            spent, caches[name] = sessions[name].call(embeds[:, -1:], caches[name], embeds.shape[1] + step)
            if step:  # the first one warms up
                found[name].values.append(spent)
    return found


def ratio(what: str, measured: Series, against: Series) -> Row:
    """A row of times with the median and quartiles of the ratios of neighbours."""
    ratios = [a / b for a, b in zip(measured.values, against.values, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    spread = f"{middle:.3f} ({low:.3f} to {high:.3f})"
    return Row(what, milliseconds(measured.median()), milliseconds(against.median()), spread)


def write_graphs(model: Any, place: Path, opset: int, dtype: str = "float32") -> dict[str, int]:
    """Write the plain and both guarded decoders; the bytes of each."""
    from sasa_export.writers.onnx.graphs import decoder_graph, write_model
    from sasa_export.writers.onnx.layout import stock_type
    from sasa_export.writers.onnx.recipes import recipe_of

    recipe = recipe_of(stock_type(model.config.model_type))
    sizes = {}
    settings = model.config.sasa
    for name in (PLAIN, GUARDED, EVERY):
        model.config.sasa = {**settings, "gate": "every-token"} if name == EVERY else settings
        path = place / name / "decoder.onnx"
        path.parent.mkdir(parents=True)
        write_model(decoder_graph(model, recipe, opset=opset, dtype=dtype, guarded=name != PLAIN), path)
        sizes[name] = sum(file.stat().st_size for file in path.parent.iterdir())
    model.config.sasa = settings
    return sizes


def measure(base: Path, patched: Path, place: Path, tokens: int, steps: int, repetitions: int, opset: int) -> Any:
    """All rows, and the settings of the patched model."""
    import torch

    pair = load(base, patched, tokens)
    settings, threads = pair.patched.config.sasa, torch.get_num_threads()
    _, floor = blocks_floor(settings)
    clock = clock_for(threads)
    click.echo("exporting ...", err=True)
    sizes = write_graphs(pair.patched, place, opset)
    sessions = {name: Session(place / name / "decoder.onnx", threads) for name in (PLAIN, GUARDED, EVERY)}
    inputs = pair.prompts["text"]
    with torch.no_grad():
        embeds = pair.plain.get_input_embeddings()(inputs["input_ids"]).numpy()  # (1, tokens, hidden)
        click.echo("prefill and first token ...", err=True)
        found = rounds(
            {
                "plain": prompt_of(sessions[PLAIN], embeds),
                "guarded": prompt_of(sessions[GUARDED], embeds),
                "every": prompt_of(sessions[EVERY], embeds),
                "torch": timed(prefill(pair.patched, inputs), clock),
                "torch first": timed(first_token(pair.patched, inputs), clock),
                "two-pass": timed(two_pass(pair.plain, inputs, settings, pair.patched.sasa.probe), clock),
            },
            repetitions,
        )
        click.echo("decoding ...", err=True)
        decoders = {**sessions, "torch": TorchDecoder(pair.patched, threads)}
        stepped = {name: Series() for name in decoders}
        for _ in range(repetitions):
            for name, series in decode_in_turn(decoders, embeds, steps).items():
                stepped[name].values += series.values
    length = f"{embeds.shape[1]} tokens"
    at_floor = Series([value * floor for value in found["plain"].values])
    least = min(stepped[GUARDED].values) / min(stepped[PLAIN].values)
    plain_and_probe = sizes[PLAIN] + 4 * (hidden_size(base) + 1)
    rows = [
        ratio(f"prefill against the plain graph ({length})", found["guarded"], found["plain"]),
        ratio(f"prefill against the floor of {floor:.3f} ({length})", found["guarded"], at_floor),
        ratio(f"decoding against the plain graph, per token ({length} before)", stepped[GUARDED], stepped[PLAIN]),
        Row("the same, the fastest step of each", milliseconds(min(stepped[GUARDED].values)),
            milliseconds(min(stepped[PLAIN].values)), f"{least:.3f}"),
        Row("decoder file against the plain one and the probe", megabytes(sizes[GUARDED]), megabytes(plain_and_probe),
            f"{sizes[GUARDED] / plain_and_probe:.4f}"),
        ratio(f"prefill, every token judged, against the plain graph ({length})", found["every"], found["plain"]),
        ratio("decoding, every token judged, against the plain graph, per token", stepped[EVERY], stepped[PLAIN]),
        Row("bytes of cache per token, every token judged", f"{sessions[EVERY].token_bytes:,}",
            f"{sessions[PLAIN].token_bytes:,}", f"{sessions[EVERY].token_bytes / sessions[PLAIN].token_bytes:.3f}"),
        Row("the same, judged by prompt", f"{sessions[GUARDED].token_bytes:,}", f"{sessions[PLAIN].token_bytes:,}",
            f"{sessions[GUARDED].token_bytes / sessions[PLAIN].token_bytes:.3f}"),
        ratio(f"prefill against the patched model in torch ({length})", found["guarded"], found["torch"]),
        ratio("decoding against the patched model in torch, per token", stepped[GUARDED], stepped["torch"]),
        ratio(f"prefill against two passes, then generate, in torch ({length})", found["guarded"], found["two-pass"]),
        ratio(f"first token in torch against the same ({length})", found["torch first"], found["two-pass"]),
    ]  # fmt: skip
    return rows, settings


@click.command(help=(__doc__ or "").split("\n\n")[0])
@click.option("--model", default="smol-llava", show_default=True, help="Alias, hub id or local directory.")
@click.option("--tokens", default=384, show_default=True, help="About how long the prompt is.")
@click.option("--steps", default=32, show_default=True, help="Tokens to decode in a round.")
@click.option("--repetitions", default=9, show_default=True, help="Rounds.")
@click.option("--threads", default=1, show_default=True, help="Of torch and onnxruntime.")
@click.option("--opset", default=23, show_default=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Also write the table here, as Markdown.")
def main(model: str, tokens: int, steps: int, repetitions: int, threads: int, opset: int, out: Path | None) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch

    from sasa_export.errors import SasaExportError
    from sasa_export.models import open_source
    from sasa_export.options import Options
    from sasa_export.pipeline import patch

    torch.set_num_threads(threads)
    try:
        source = open_source(model)
        with tempfile.TemporaryDirectory(prefix="sasa-bench-") as folder:
            place = Path(folder)
            write_probe(place / "probe.safetensors", hidden_size(source.directory))
            options = Options(model=model, out=place / "patched", probe=place / "probe.safetensors", verify="files")
            patch(options)
            rows, settings = measure(
                source.directory, place / "patched", place / "graphs", tokens, steps, repetitions, opset
            )
    except SasaExportError as error:
        raise click.ClickException(str(error)) from None
    said = f"{machine(source.name, settings, threads, repetitions)} Opset {opset}, CPU provider."
    show("ONNX", rows)
    click.echo(said)
    if out is not None:
        command = f"python benchmarks/onnx_cost.py --tokens {tokens} --steps {steps} --repetitions {repetitions}"
        made = f"Made by `{command} --threads {threads} --opset {opset} --out {out}`.\n"
        parts = ["# What the guard costs in ONNX\n", made, said + "\n", markdown("Side by side", rows)]
        out.write_text("\n".join(parts), encoding="utf-8")
        click.echo(f"Written to {out}")


if __name__ == "__main__":
    main()
