"""What an NVIDIA GPU shows of the patched decoder in ONNX, in one command on a machine that has one.

    python benchmarks/onnx_gpu.py [--model smol-llava] [--onnx-dtype float16]

Checks, one ✓ or ✗ each: which nodes the CUDA provider does not take, what is copied between the GPU and the host
(around the `If` above all), that the cache stays on the GPU with IO binding, and that logits and P(unsafe) are
the CPU provider's. Then prefill and decoding against a plain export of the same model, both on the GPU.
`--provider cpu` tries the script itself on a machine without a GPU.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import numpy as np
from onnx_cost import GUARDED, PLAIN, write_graphs
from torch_cost import blocks_floor, hidden_size, load, write_probe

PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
# Of P(unsafe), and of the logits against the largest, between two providers.
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 0.15, "int8": 2e-2, "int4": 2e-2}
# onnxruntime computes shapes on the host by design, and the predicate of an If is read there.
SMALL = 4096  # bytes


class Decoder:
    """One decoder on one provider, fed through IO binding; everything stays where it was computed."""

    def __init__(self, path: Path, provider: str, profile: Path | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        wanted: list[Any] = [PROVIDERS[provider]]
        if provider == "cuda":
            wanted = [(PROVIDERS["cuda"], {"use_tf32": 0}), PROVIDERS["cpu"]]
        self.session = onnxruntime.InferenceSession(path, options, providers=wanted)
        if self.session.get_providers()[0] != PROVIDERS[provider]:
            raise click.ClickException(
                f"onnxruntime could not start {PROVIDERS[provider]}. Install the CUDA and cuDNN libraries that it "
                "wants: pip install 'onnxruntime-gpu[cuda,cudnn]'."
            )
        self.device = provider
        self.value: Any = onnxruntime.OrtValue
        self.past = [v for v in self.session.get_inputs() if v.name.startswith("past_key_values.")]
        self.names = [value.name for value in self.session.get_outputs()]
        axes = {value.name: len(value.shape) for value in self.session.get_inputs()}["position_ids"]
        self.position_shape = (3, 1) if axes == 3 else (1,)
        self.start()

    def start(self) -> None:
        """Forget everything: an empty cache."""
        self.length = 0
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(bfloat16)": 16}
        self.cache = {
            value.name: self.value.ortvalue_from_shape_and_type(
                [1, value.shape[1], 0, value.shape[3]], kinds[value.type], self.device, 0
            )
            for value in self.past
        }

    def call(self, embeds: Any) -> dict[str, Any]:
        """Feed embeddings (1, tokens, hidden), an OrtValue of the device; all outputs, on the device."""
        count = embeds.shape()[1]
        positions = np.broadcast_to(np.arange(self.length, self.length + count), (*self.position_shape, count))
        self.length += count
        binding = self.session.io_binding()
        binding.bind_ortvalue_input("inputs_embeds", embeds)
        binding.bind_cpu_input("attention_mask", np.ones((1, self.length), np.int64))
        binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions))
        for name, value in self.cache.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.names:
            binding.bind_output(name, self.device)
        self.session.run_with_iobinding(binding)
        values = dict(zip(self.names, binding.get_outputs(), strict=True))
        self.cache = {
            name.replace("present.", "past_key_values."): value
            for name, value in values.items()
            if name.startswith("present.")
        }
        return values

    def put(self, array: np.ndarray) -> Any:
        return self.value.ortvalue_from_numpy(np.ascontiguousarray(array), self.device, 0)


def run(decoder: Decoder, embeds: np.ndarray, steps: int) -> list[dict[str, Any]]:
    """A prompt and `steps` times its last embedding: logits and P(unsafe) of each call, as numpy."""
    decoder.start()
    parts = [decoder.put(embeds), *[decoder.put(embeds[:, -1:])] * steps]
    names = [name for name in ("logits", "unsafe_probability") if name in decoder.names]
    return [{name: values[name].numpy() for name in names} for values in map(decoder.call, parts)]


def seconds(decoder: Decoder, embeds: np.ndarray, steps: int) -> tuple[float, float]:
    """Of the prompt, and of the median step. Reading P(unsafe) back waits until the GPU is done."""
    decoder.start()
    spent = []
    for part in [decoder.put(embeds), *[decoder.put(embeds[:, -1:])] * steps]:
        before = time.perf_counter()
        decoder.call(part)["logits"].numpy()
        spent.append(time.perf_counter() - before)
    return spent[0], statistics.median(spent[1:])


def placement(profile: Path, provider: str) -> tuple[list[str], list[str]]:
    """What a profile says: large nodes that another provider ran, and large copies between host and GPU."""
    elsewhere: Counter[str] = Counter()
    copies: Counter[str] = Counter()
    for event in json.loads(profile.read_text(encoding="utf-8")):
        told = event.get("args", {})
        if not event.get("name", "").endswith("_kernel_time") or "provider" not in told:
            continue
        size = int(told.get("output_size") or 0)
        node = event["name"].removesuffix("_kernel_time")
        if size <= SMALL:
            continue
        if told.get("op_name", "").startswith("Memcpy"):
            copies[f"{node} ({size:,} bytes)"] += 1
        elif told["provider"] != PROVIDERS[provider]:
            elsewhere[f"{node} ({told.get('op_name')}, {told['provider']})"] += 1
    return [*elsewhere], [*copies]


def say(passed: bool, name: str, detail: str) -> bool:
    click.echo(f"{'✓' if passed else '✗'} {name}: {detail}")
    return passed


def check(place: Path, embeds: np.ndarray, provider: str, dtype: str, steps: int) -> bool:
    """All checks of the guarded decoder; True where none failed."""
    path = place / GUARDED / "decoder.onnx"
    decoder = Decoder(path, provider, profile=place / "profile")
    found = run(decoder, embeds, steps)
    elsewhere, copies = placement(Path(decoder.session.end_profiling()), provider)
    some = f"{len(elsewhere)} of more than {SMALL} bytes ran elsewhere: {', '.join(elsewhere[:5])}"
    good = [say(not elsewhere, f"nodes run on {PROVIDERS[provider]}", some if elsewhere else "all that are large")]
    many = f"{len(copies)} of more than {SMALL} bytes: {', '.join(copies[:5])}"
    good.append(say(not copies, "nothing large is copied between GPU and host", many if copies else "none"))
    kept = {value.device_name() for value in decoder.cache.values()}
    good.append(say(kept == {provider}, "IO binding keeps the cache where it is", f"on {', '.join(sorted(kept))}"))
    if dtype == "bfloat16":
        click.echo("- the CPU provider has no bfloat16, so there is nothing to compare with")
        return all(good)
    wanted = run(Decoder(path, "cpu"), embeds, steps)
    scale = max(float(np.abs(call["logits"]).max()) for call in wanted)
    logits = max(
        float(np.abs(a["logits"] - b["logits"]).max()) for a, b in zip(found, wanted, strict=True)
    )  # fmt: skip
    probability = abs(float(found[0]["unsafe_probability"][0]) - float(wanted[0]["unsafe_probability"][0]))
    tolerance = TOLERANCE[dtype]
    detail = f"logits {logits / scale:.1e} of the largest, P(unsafe) {probability:.1e}, tolerance {tolerance:g}"
    good.append(say(max(logits / scale, probability) <= tolerance, "it says what the CPU provider says", detail))
    silent = all(np.isnan(call["unsafe_probability"]).all() for call in found[1:])
    good.append(say(silent, "no step of an answer is judged", f"{steps} steps"))
    return all(good)


def compare(place: Path, embeds: np.ndarray, provider: str, steps: int, repetitions: int, floor: float) -> None:
    """Print prefill and decoding against the plain graph, both sessions in turn."""
    decoders = {name: Decoder(place / name / "decoder.onnx", provider) for name in (PLAIN, GUARDED)}
    ratios: list[tuple[float, float]] = []
    for turn in range(repetitions + 1):
        spent = {
            name: seconds(decoders[name], embeds, steps) for name in sorted(decoders, reverse=bool(turn % 2))
        }  # fmt: skip
        if turn:  # the first one warms up
            ratios.append((spent[GUARDED][0] / spent[PLAIN][0], spent[GUARDED][1] / spent[PLAIN][1]))
    prefill, decoding = (statistics.median(values) for values in zip(*ratios, strict=True))
    click.echo(f"prefill  x {prefill:.3f} against the plain graph (by block count {floor:.3f})")
    click.echo(f"decoding x {decoding:.3f} against the plain graph")


@click.command(help=(__doc__ or "").split("\n\n")[0])
@click.option("--model", default="smol-llava", show_default=True, help="Alias, hub id or local directory.")
@click.option("--onnx-dtype", type=click.Choice(list(TOLERANCE)), default="float16", show_default=True)
@click.option("--provider", type=click.Choice(list(PROVIDERS)), default="cuda", show_default=True)
@click.option("--tokens", default=384, show_default=True, help="About how long the prompt is.")
@click.option("--steps", default=32, show_default=True, help="Tokens to decode.")
@click.option("--repetitions", default=9, show_default=True)
def main(model: str, onnx_dtype: str, provider: str, tokens: int, steps: int, repetitions: int) -> None:
    import onnxruntime
    import torch
    from transformers import AutoModelForImageTextToText

    there = onnxruntime.get_available_providers()
    if PROVIDERS[provider] not in there or (provider == "cuda" and not has_gpu()):
        raise click.ClickException(
            f"{PROVIDERS[provider]} cannot be had here (onnxruntime has {', '.join(there)}, and "
            f"{'a' if has_gpu() else 'no'} GPU was found). Run it on a machine with an NVIDIA GPU, or give "
            "--provider cpu to try the script alone."
        )
    if provider == "cuda" and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    from sasa_export.errors import SasaExportError
    from sasa_export.models import open_source
    from sasa_export.options import Options
    from sasa_export.pipeline import patch

    try:
        source = open_source(model)
        with tempfile.TemporaryDirectory(prefix="sasa-gpu-") as folder:
            place = Path(folder)
            write_probe(place / "probe.safetensors", hidden_size(source.directory))
            patch(Options(model=model, out=place / "patched", probe=place / "probe.safetensors", verify="files"))
            pair = load(source.directory, place / "patched", tokens)
            with torch.no_grad():
                ids = pair.prompts["text"]["input_ids"]
                embeds = pair.plain.get_input_embeddings()(ids).numpy()  # (1, tokens, hidden)
            _, floor = blocks_floor(pair.patched.config.sasa)
            del pair
            kind = "float32" if onnx_dtype in ("int8", "int4") else onnx_dtype
            guarded = AutoModelForImageTextToText.from_pretrained(
                place / "patched", dtype=kind, trust_remote_code=True
            ).eval()
            write_graphs(guarded, place / "graphs", 23, onnx_dtype)
            del guarded
            good = check(place / "graphs", embeds, provider, onnx_dtype, steps)
            compare(place / "graphs", embeds, provider, steps, repetitions, floor)
    except SasaExportError as error:
        raise click.ClickException(str(error)) from None
    sys.exit(0 if good else 1)


def has_gpu() -> bool:
    """Is there an NVIDIA driver? onnxruntime lists the CUDA provider without one too."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists()


if __name__ == "__main__":
    main()
