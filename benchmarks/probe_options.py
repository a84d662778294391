"""What each option of the probe is worth on a model: AUC on the evaluation prompts of `evaluate` against its cost.

The model is patched once for each option, with its own calibration, and every patched model judges the same prompts.
Gains are differences of AUC on the same prompts, with an interval over groups of prompts. What is done lies in --work,
and another run goes on from there; so several processes can share the options with --only.

Usage: python benchmarks/probe_options.py --out probe-options.md
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click
import numpy as np

PLAIN, DEFAULT = "--projection none", "the default"


def choices(blocks: int, safety: int, semantic: int) -> dict[str, dict[str, Any]]:
    """The options by what they are called; the further pair lies close to the end, where its lane costs little."""
    close = max(1, round(blocks / 8))
    pair = (blocks - 2 - close, blocks - 2)
    pair = pair if pair != (safety, semantic) else (pair[0] - 1, pair[1])
    return {
        DEFAULT: {},
        PLAIN: {"projection": "none"},
        f"--probe-block {safety}": {"probe_block": safety},
        "--probe-positions 4": {"probe_positions": 4},
        f"--further-pair {pair[0]}:{pair[1]}": {"further_pair": (f"{pair[0]}:{pair[1]}",)},
        # So strong a probe may be certain of harmless prompts, and no threshold then keeps its promise.
        "--regularization 1 --threshold 0.5": {"regularization": "1", "threshold": 0.5},
    }


def measured(model: str, name: str, options: dict[str, Any], work: Path, batch_size: int) -> None:
    """Patch the model with one option and ask it, unless its result is there."""
    from sasa_export.evaluate import EvaluateOptions
    from sasa_export.evaluate.answer import answer_all
    from sasa_export.evaluate.detection import detection
    from sasa_export.evaluate.guarded import open_baseline, open_guarded
    from sasa_export.evaluate.prompts import gather
    from sasa_export.evaluate.torch_model import TorchModel, load_guarded
    from sasa_export.measure import running
    from sasa_export.options import Options
    from sasa_export.pipeline import patch
    from sasa_export.report import Console
    from sasa_export.share import crew

    folder = work / "".join(letter if letter.isalnum() else "-" for letter in name)
    if (folder / "figures.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    report, directory = Console(), folder / "patched"
    if not directory.exists():
        patch(Options(model=model, out=directory, link=True, batch_size=batch_size, verify="files", **options), report)
    guarded = open_guarded(directory)
    dtype, device = running(open_baseline(guarded, None), Options())
    loaded, processor = load_guarded(directory, dtype, device)
    prompts = gather(EvaluateOptions(directory, folder / "report"), guarded, processor).evaluation
    patched = TorchModel(loaded, processor, batch_size, 1)
    with report.bar(len(prompts), name) as advance:
        answers = answer_all(lambda: patched, prompts, batch_size, folder, "patched", crew(), advance)
    scores = np.array([answer.unsafe_probability for answer in answers])  # (prompts,)
    labels = np.array([prompt.label for prompt in prompts])  # (prompts,)
    groups, rate = [prompt.group for prompt in prompts], float(guarded.made.get("max_false_positive_rate", 0.02))
    found = detection(scores, scores >= guarded.sasa["threshold"], labels, groups, rate)
    assert found is not None
    entry = {
        "name": name,
        "cost": (guarded.blocks + guarded.again) / guarded.blocks,
        "auc": vars(found.auc),
        "recall": vars(found.recall_at_rate),
        "scores": scores.tolist(),
        "labels": labels.tolist(),
        "groups": groups,
        "rate": rate,
        "said": f"{labels.sum()} harmful and {(1 - labels).sum()} harmless prompts, {dtype} on {device}",
    }
    (folder / "figures.json").write_text(json.dumps(entry), encoding="utf-8")


def table(entries: list[dict[str, Any]]) -> str:
    """A row an option, and what it gains over the default and over the probe without projection."""
    from sasa_export.evaluate.compare import difference
    from sasa_export.evaluate.shares import Interval

    def said(found: dict[str, float] | Interval, *, signed: bool = False) -> str:
        value, low, high = (found if isinstance(found, dict) else vars(found)).values()
        return "{:{s}.3f} ({:{s}.3f} to {:{s}.3f})".format(value, low, high, s="+" if signed else "")

    by_name = {entry["name"]: entry for entry in entries}
    labels, groups = np.array(entries[0]["labels"]), entries[0]["groups"]
    rows = []
    for entry in entries:
        gains = []
        for other in (DEFAULT, PLAIN):
            scores = [np.array(one["scores"]) for one in (entry, by_name[other])]
            same = entry["name"] == other
            gains.append("" if same else said(difference(scores[0], scores[1], labels, groups), signed=True))
        name = entry["name"] if entry["name"] == DEFAULT else f"`{entry['name']}`"
        rows.append([name, f"{entry['cost']:.2f}", said(entry["auc"]), *gains, said(entry["recall"])])
    rate = f"recall at {entries[0]['rate']:.1%}"
    head = ["option", "prompt's blocks, against plain", "AUC", "over the default", "over `--projection none`", rate]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


@click.command(help=__doc__)
@click.option("--model", default="smol-llava", show_default=True, help="Alias, hub id or directory.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/probe-options"), show_default=True)
@click.option("--only", multiple=True, help="Do these options alone, and write no table.")
@click.option("--batch-size", default=16, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Markdown file to write.")
def main(model: str, work: Path, only: tuple[str, ...], batch_size: int, out: Path | None) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    from sasa_export.open import layers_of, open_source
    from sasa_export.open.load import read_sizes

    source = open_source(model)
    sizes = read_sizes(source)
    safety, semantic, _ = layers_of(source, sizes.blocks, sizes.hidden, None, None)
    known = choices(sizes.blocks, safety, semantic)
    for name in only:
        if name not in known:
            raise click.UsageError(f"--only is {name!r}; it must be one of {', '.join(known)}.")
    for name, options in known.items():
        if not only or name in only:
            measured(model, name, options, work, batch_size)
    if only:
        return
    entries = [json.loads(path.read_text(encoding="utf-8")) for path in work.glob("*/figures.json")]
    entries.sort(key=lambda entry: list(known).index(entry["name"]))
    model_said = f"{source.name}: {sizes.blocks} blocks, s = {safety}, f = {semantic}"
    text = (
        f"# What each option of the probe is worth\n\n{model_said}; {entries[0]['said']}, by `make bench-probe`. "
        "Each row is a patched model with a calibration of its own. AUC is that of P(unsafe) on the evaluation "
        "prompts; what it gains is a difference on the same prompts. In brackets the 95 % interval over groups of "
        "prompts.\n\n"
        f"{table(entries)}\n"
    )
    click.echo(text)
    if out is not None:
        out.write_text(text, encoding="utf-8")
        click.echo(f"Written to {out}")


if __name__ == "__main__":
    main()
