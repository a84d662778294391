"""What it costs to judge however a prompt is fed, and to judge every token, side by side in one run on torch.

The plain model, the patched one, the one that judges every token, and, with --before, a directory that another
version of the tool wrote, are timed in turn, round after round; the ratios to the plain model within a round count.

- prefill: the forward pass over a prompt, whole and in pieces of 64 tokens.
- second turn: a prompt of 24 tokens on the cache of a long first turn, which the second lane runs over as a whole.
- decoding: one token after another on a warm cache, per token.
- cache: bytes per token.

Usage: python benchmarks/gate_cost.py --out gate_cost.md
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import click
from torch_cost import (
    Row,
    Work,
    compare,
    decode,
    hidden_size,
    load,
    machine,
    markdown,
    milliseconds,
    prefill,
    rounds,
    show,
    write_probe,
)

PIECE = 64  # tokens
TURN = 24  # tokens
MODEL = "AutoModelForImageTextToText"


def pieces(model: Any, inputs: dict[str, Any]) -> Work:
    """The prompt in pieces, on one cache."""

    def run() -> None:
        ids, cache = inputs["input_ids"], None
        for start in range(0, ids.shape[1], PIECE):
            end = min(start + PIECE, ids.shape[1])
            output = model(
                input_ids=ids[:, start:end], attention_mask=inputs["attention_mask"][:, :end], past_key_values=cache,
                use_cache=True, logits_to_keep=1,
            )  # fmt: skip
            cache = output.past_key_values

    return run


def second_turn(model: Any, inputs: dict[str, Any]) -> Work:
    """Seconds for the end of the prompt again, behind the whole prompt, whose prefill is not timed."""
    import time

    import torch

    def run() -> float:
        cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
        more = inputs["input_ids"][:, -TURN:]  # (1, turn): it ends in the generation prompt, as a turn does
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], dim=1)
        start = time.perf_counter()
        model(input_ids=more, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start

    return run


def cache_bytes(model: Any, inputs: dict[str, Any]) -> float:
    """Bytes that the cache holds for a token of the prompt."""
    cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / inputs["input_ids"].shape[1]


def costs(models: dict[str, Any], inputs: dict[str, Any], repetitions: int, new_tokens: int) -> list[Row]:
    """The table's rows; `models` holds the plain one by the name "plain"."""
    import torch

    kinds = {
        "prefill, whole": prefill,
        f"prefill, in pieces of {PIECE} tokens": pieces,
        f"a second turn of {TURN} tokens on a kept cache": second_turn,
        f"decoding, per token ({new_tokens} tokens)": lambda model, given: decode(model, given, new_tokens),
    }
    rows = []
    with torch.no_grad():
        for what, make in kinds.items():
            click.echo(f"{what} ...", err=True)
            # A version that does not judge such a call raises; then its row is left out.
            able = {name: work for name, model in models.items() if works(work := make(model, inputs))}
            found = rounds(able, repetitions)
            rows += [
                compare(f"{what}: {name}", found[name], found["plain"], milliseconds)
                for name in able
                if name != "plain"
            ]
        plain = cache_bytes(models["plain"], inputs)
        for name, model in models.items():
            size = cache_bytes(model, inputs)
            if name != "plain":
                rows.append(Row(f"cache per token: {name}", kilobytes(size), kilobytes(plain), f"{size / plain:.3f}"))
    return rows


def works(work: Work) -> bool:
    try:
        work()
    except NotImplementedError:
        return False
    return True


def by_own_code(directory: Path) -> Any:
    """A directory of another version, through its own classes: by the Auto classes it would get this version's."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    names = json.loads((directory / "config.json").read_text(encoding="utf-8"))["auto_map"]
    kinds = [get_class_from_dynamic_module(names[name], directory) for name in ("AutoConfig", MODEL)]
    return kinds[1].from_pretrained(directory, config=kinds[0].from_pretrained(directory), dtype="float32")


def kilobytes(size: float) -> str:
    return f"{size / 1e3:,.1f} kB"


@click.command(help=(__doc__ or "").split("\n\n")[0])
@click.option("--model", default="smol-llava", show_default=True, help="Alias, hub id or local directory.")
@click.option("--before", type=click.Path(path_type=Path, exists=True), help="A patched directory to compare with.")
@click.option("--repetitions", default=9, show_default=True, help="Rounds for each row.")
@click.option("--tokens", default=512, show_default=True, help="Length of the prompt.")
@click.option("--new-tokens", default=32, show_default=True, help="Tokens to decode in a round.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Also write the table here, as Markdown.")
def main(model: str, before: Path | None, repetitions: int, tokens: int, new_tokens: int, out: Path | None) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch
    from transformers import AutoModelForImageTextToText

    from sasa_export.models import open_source
    from sasa_export.options import Options
    from sasa_export.pipeline import patch

    source = open_source(model)
    with tempfile.TemporaryDirectory(prefix="sasa-bench-") as folder:
        work, models = Path(folder), {}
        write_probe(work / "probe.safetensors", hidden_size(source.directory))
        for gate in ("prompt", "every-token"):
            patch(
                Options(
                    model=str(source.directory), out=work / gate, probe=work / "probe.safetensors", gate=gate,
                    verify="files", link=True,
                )
            )  # fmt: skip
        pair = load(source.directory, work / "prompt", tokens)
        models = {"plain": pair.plain, "judged by prompt": pair.patched}
        models["judged by token"] = AutoModelForImageTextToText.from_pretrained(
            work / "every-token", dtype="float32", trust_remote_code=True
        ).eval()
        if before is not None:
            models["before"] = by_own_code(before).eval()
        rows = costs(models, pair.prompts["text"], repetitions, new_tokens)
        said = machine(source.name, pair.patched.config.sasa, torch.get_num_threads(), repetitions)
    title = f"Against the plain model, {pair.prompts['text']['input_ids'].shape[1]} tokens of text"
    show(title, rows)
    click.echo(said)
    if out is not None:
        out.write_text(f"{said}\n\n{markdown(title, rows)}", encoding="utf-8")
        click.echo(f"Written to {out}")


if __name__ == "__main__":
    main()
