"""The command line: flags, progress and exit codes. Other modules do the work."""

import signal
import sys
from pathlib import Path
from typing import Any

import click

from sasa_export.errors import SasaExportError
from sasa_export.flags import flags
from sasa_export.options import COUNT, LANE_TOKENS, REACH, Options
from sasa_export.report import Console, quiet
from sasa_export.research.options import EvaluateOptions, LocateOptions


class Main(click.Group):
    """A group that prints our errors in one line."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        # SIGTERM raises SystemExit, so that context managers remove unfinished output.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            return super().main(*args, **kwargs)
        except SasaExportError as error:
            click.echo(f"Error: {error}", err=True)
        except ModuleNotFoundError as error:
            if error.name is None:
                raise
            package = error.name.partition(".")[0]
            what = f"this needs the package {package}, which is not installed"
            click.echo(f"Error: {what}. Install it, or sasa-export again with all that it asks for.", err=True)
        sys.exit(1)


def help_all(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    """Print the help with all options, then exit."""
    if value:
        for option in context.command.params:
            if isinstance(option, click.Option):
                option.hidden = False
        click.echo(context.get_help())
        context.exit()


@click.group(cls=Main, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@flags(Options, required=False)
@click.option(
    "--help-all", is_flag=True, is_eager=True, expose_value=False, callback=help_all, help="Show all options and exit."
)
@click.version_option(package_name="sasa-export")
@click.pass_context
def main(context: click.Context, /, **values: Any) -> None:
    """Bake a safety gate (SASA, arXiv 2507.21637) into an open vision-language model.

    \b
    sasa-export --model llava --out patched/
    sasa-export --model ./my-llava --out patched/ --safety-layer 13 --semantic-layer 15

    The patched model loads with plain from_pretrained and judges every prompt before it answers. It refuses harmful
    prompts, and answers all others exactly as the original model.
    """
    if context.invoked_subcommand is not None:
        return
    for name in ("model", "out"):
        if values[name] is None:
            raise click.UsageError(f"Missing option '--{name}'. See sasa-export --help.")
    quiet()
    from sasa_export.pipeline import patch

    patch(Options(**values), Console())


@main.command()
@click.option("--model", required=True, help="Alias, hub id or local directory.")
@click.option("--safety-layer", type=int, help="Zero-based. Default: what the family's file says.")
@click.option("--semantic-layer", type=int, help="Zero-based. Default: likewise.")
@click.option("--lane-tokens", type=COUNT, default=REACH, show_default=True, help=LANE_TOKENS)
def trace(model: str, safety_layer: int | None, semantic_layer: int | None, lane_tokens: int) -> None:
    """Draw a decoder before and after the rewrite (Mermaid)."""
    quiet()
    from sasa_export.backends import open_original
    from sasa_export.graph.diagram import mermaid
    from sasa_export.graph.rewrite import LaneSettings, rewrite
    from sasa_export.models import layers_of

    original = open_original(Options(model=model))
    graph, sizes = original.graph, original.sizes
    safety, semantic, layers_from = layers_of(original.source, sizes.blocks, sizes.hidden, safety_layer, semantic_layer)
    after = rewrite(graph, LaneSettings(safety, semantic, softcap=sizes.softcap, tokens=lane_tokens))
    for node in graph:
        click.echo(f"{node.name:<14} {node.op:<8} {node.module or '':<40} <- {', '.join(node.inputs)}")
    click.echo(f"\nsafety layer {safety}, semantic layer {semantic} ({layers_from})")
    click.echo(f"\nBefore:\n\n```mermaid\n{mermaid(graph)}```\n\nAfter:\n\n```mermaid\n{mermaid(after)}```")


@main.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--device", default="cpu", show_default=True, help="Where to load it.")
@click.option("--files", "only_files", is_flag=True, help="Check what needs no model in memory.")
@click.option("--load", help="Load it as one is served, and say what that costs: bfloat16, bnb-nf4, quanto-int8 ...")
def verify(directory: Path, device: str, only_files: bool, load: str | None) -> None:
    """Check a patched directory's files, verdicts and answers."""
    quiet()
    from sasa_export.verify import verify_directory

    checks = verify_directory(directory, device=device, only_files=only_files, load=load)
    report = Console()
    for check in checks:
        report.check(check.passed, check.name, check.detail)
    if not all(check.passed or (check.passed is None and not only_files) for check in checks):
        todo = f" with --load {load}: quantize the original, and export that" if load else "; export the model again"
        raise SasaExportError(f"{directory} failed its verification. Do not serve it{todo}.")


@main.command()
@flags(LocateOptions)
def locate(**values: Any) -> None:
    """Propose a model's safety layer and semantic layer.

    Measures in which blocks a model perceives danger, understands and speaks. Writes report.html (which needs no
    network), report.md, locate.json and pictures. Give the same command again to resume an interrupted run. Start it
    with accelerate launch to share the work among several processes.
    """
    quiet()
    from sasa_export.research.locate.run import locate

    locate(LocateOptions(**values), Console())


@main.command()
@flags(EvaluateOptions)
def evaluate(**values: Any) -> None:
    """Measure what a patched model refuses and answers.

    Compares the plain model, the patched model, a probe without projection, and words alone, on the same prompts.
    Writes report.html (which needs no network), report.md, evaluate.json, answers.jsonl and pictures. Give the same
    command again to resume an interrupted run. Start it with accelerate launch to share it among several processes.
    """
    quiet()
    from sasa_export.research.evaluate.run import evaluate

    evaluate(EvaluateOptions(**values), Console())


@main.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("data")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="JSONL file to write: id (or place in DATA), probability and verdict a line.",
)
@click.option(
    "--refuse-at-most",
    type=click.FloatRange(0, 1, max_open=True),
    help="Propose the lowest threshold that refuses at most this share of the prompts.",
)
@click.option("--write-threshold", is_flag=True, help="Write the proposed threshold into config.json.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Prompts at a time.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 ..., or spread.")
def score(**values: Any) -> None:
    """Give P(unsafe) and a verdict for unlabelled prompts.

    DIRECTORY is a patched directory, of safetensors or of ONNX graphs. DATA is a JSONL file with one object per line,
    {"image": path or null, "prompt": text}, or any value that --calibration takes.
    """
    quiet()
    from sasa_export.research.score import score

    click.echo("\n".join(score(**values, report=Console()).summary()))
