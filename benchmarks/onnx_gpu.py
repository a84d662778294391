"""What an NVIDIA GPU shows of the guarded decoder in ONNX, in one command on a machine that has one.

    python benchmarks/onnx_gpu.py [--model smol-llava] [--onnx-dtype float16]

Checks, one ✓ or ✗ each: which nodes the CUDA provider does not take, what is copied between the GPU and the host
(around the `If` above all), that the cache stays on the GPU with IO binding, and that logits and P(unsafe) are
the CPU provider's. Then prefill and decoding against a plain export of the same model, both on the GPU.
`--provider cpu` tries the script itself on a machine without a GPU.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
from onnx_cost import GUARDED, PROVIDERS, Decoder, embeddings, write_decoders
from side_by_side import Row, Settings, compare, describe, in_turn, make_pair, publish

from sasa_export.flags import flags
from sasa_export.report import Check, Console, quiet

# Of P(unsafe), and of the logits against the largest, between two providers.
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "int8": 2e-2, "int4": 2e-2}
# onnxruntime computes shapes on the host by design, and the predicate of an If is read there.
SMALL = 4096  # bytes
STEPS = 32  # of decoding, that are checked


def answers(decoder: Decoder, embeds: np.ndarray) -> list[tuple[np.ndarray, float]]:
    """The prompt (1, tokens, hidden) and STEPS times its last embedding: logits (vocabulary,), P(unsafe) of each."""
    decoder.start()
    found = []
    for part in [embeds, *[embeds[:, -1:]] * STEPS]:
        values = decoder.call(decoder.put(part))
        found.append((values["logits"].numpy()[0, -1], float(values["unsafe_probability"].numpy()[0])))
    return found


def placement(profile: Path, provider: str) -> tuple[list[str], list[str]]:
    """What a profile says: large nodes that another provider ran, and large copies between host and GPU."""
    elsewhere, copies = set(), set()
    for event in json.loads(profile.read_text(encoding="utf-8")):
        told, node = event.get("args", {}), event.get("name", "")
        size = int(told.get("output_size") or 0)
        if not node.endswith("_kernel_time") or "provider" not in told or size <= SMALL:
            continue
        said = f"{node.removesuffix('_kernel_time')} ({told.get('op_name')}, {told['provider']}, {size:,} bytes)"
        if told.get("op_name", "").startswith("Memcpy"):
            copies.add(said)
        elif told["provider"] != provider:
            elsewhere.add(said)
    return sorted(elsewhere), sorted(copies)


def checks(path: Path, embeds: np.ndarray, device: str, dtype: str) -> Iterator[Check]:
    """The guarded decoder at `path` on a device, beside the CPU provider."""
    provider = PROVIDERS[device]
    decoder = Decoder(path, device, profile=path.parent / "profile")
    found = answers(decoder, embeds)
    elsewhere, copies = placement(Path(decoder.session.end_profiling()), provider)
    few = f"of more than {SMALL} bytes"
    yield Check(f"nodes {few} run on {provider}", not elsewhere, ", ".join(elsewhere[:5]) or "all")
    yield Check(f"nothing {few} is copied between GPU and host", not copies, ", ".join(copies[:5]) or "nothing")
    kept = {value.device_name() for value in decoder.cache.values()}
    yield Check("IO binding keeps the cache where it is", kept == {device}, f"on {', '.join(sorted(kept))}")
    wanted = answers(Decoder(path), embeds)
    scale = max(float(np.abs(logits).max()) for logits, _ in wanted)
    off = max(float(np.abs(a - b).max()) for (a, _), (b, _) in zip(found, wanted, strict=True)) / scale
    probability = abs(found[0][1] - wanted[0][1])
    detail = f"logits {off:.1e} of the largest, P(unsafe) {probability:.1e}, tolerance {TOLERANCE[dtype]:g}"
    yield Check("it says what the CPU provider says", max(off, probability) <= TOLERANCE[dtype], detail)
    silent = all(np.isnan(probability) for _, probability in found[1:])
    yield Check("no step of an answer is judged", silent, f"{STEPS} steps")


def measure(paths: dict[str, Path], embeds: np.ndarray, device: str, settings: Settings) -> list[Row]:
    """Prefill and decoding against the plain graph. Reading the logits back waits until the GPU is done."""
    plain, guarded = (Decoder(path, device) for path in paths.values())
    seconds = replace(settings, threads=0).seconds  # by the wall clock, since the work is the GPU's
    whole = in_turn({"plain": plain.prompt(embeds), "guarded": guarded.prompt(embeds)}, settings.rounds, seconds)
    steps = in_turn({"plain": plain.step(embeds), "guarded": guarded.step(embeds)}, settings.new_tokens, seconds)
    return [
        compare(f"prefill of {embeds.shape[1]} tokens", whole.guarded, whole.plain),
        compare("decoding, per token", steps.guarded, steps.plain),
    ]


@click.command(help=(__doc__ or "").split("\n\n")[0])
@flags(Settings)
@click.option("--onnx-dtype", type=click.Choice(list(TOLERANCE)), default="float16", show_default=True)
@click.option("--provider", "device", type=click.Choice(list(PROVIDERS)), default="cuda", show_default=True)
def main(onnx_dtype: str, device: str, **given: Any) -> None:
    if device == "cuda":
        # onnxruntime lists the CUDA provider on machines without a GPU too.
        if not any(Path(place).exists() for place in ("/proc/driver/nvidia/version", "/dev/nvidia0")):
            raise click.ClickException(
                "no NVIDIA GPU was found here. Run it on a machine with one, or give --provider cpu to try the script."
            )
        onnxruntime.preload_dlls()
    quiet()
    settings, console = Settings(**given), Console()
    with tempfile.TemporaryDirectory(prefix="sasa-gpu-") as folder:
        pair = make_pair(settings, Path(folder))
        embeds, about = embeddings(pair), f"{describe(pair, settings)} Graphs: {onnx_dtype}, {PROVIDERS[device]}."
        paths = write_decoders(pair, Path(folder), onnx_dtype)
        found = list(checks(paths[GUARDED], embeds, device, onnx_dtype))
        for check in found:
            console.check(check.passed, check.name, check.detail)
        rows = measure(paths, embeds, device, settings)
    publish("The guarded decoder on a GPU", about, {"Against the plain graph": rows}, settings.out)
    sys.exit(0 if all(check.passed for check in found) else 1)


if __name__ == "__main__":
    main()
