"""What the gate costs in ONNX on a CPU, beside a plain export of the same model by the same code, and torch.

python benchmarks/onnx_cost.py [--out docs/results/onnx-cost.md]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
import torch
from side_by_side import (
    TURN,
    Pair,
    Row,
    Settings,
    Work,
    benchmark,
    compare,
    compare_sizes,
    decoding,
    early_layers,
    in_turn,
    make_pair,
    prefill,
)

from sasa_export.gate import GateSpec
from sasa_export.graph import LayerGraph
from sasa_export.models import open_source
from sasa_export.probe.fit import Probe
from sasa_export.report import Silent
from sasa_export.writers.directory import Patch

PLAIN, GUARDED = "plain", "guarded"
PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Decoder:
    """One decoder graph on one provider, fed through IO binding: the cache stays where it was computed.

    Args:
        threads: of onnxruntime; 0 leaves it to it.
        profile: where a profile of every node is written, as the beginning of a file's name.
    """

    def __init__(self, path: Path, device: str = "cpu", threads: int = 0, profile: Path | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        wanted: list[Any] = [PROVIDERS["cpu"]]
        if device == "cuda":
            wanted.insert(0, (PROVIDERS["cuda"], {"use_tf32": 0}))
        self.session = onnxruntime.InferenceSession(path, options, providers=wanted)
        if self.session.get_providers()[0] != PROVIDERS[device]:
            raise click.ClickException(
                f"onnxruntime could not start {PROVIDERS[device]}. Install the CUDA and cuDNN libraries that it wants: "
                "pip install 'onnxruntime-gpu[cuda,cudnn]'."
            )
        self.device = device
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.past = [value for value in self.session.get_inputs() if value.name.startswith("past_key_values.")]
        axes = next(len(value.shape) for value in self.session.get_inputs() if value.name == "position_ids")
        self.position_shape = (3, 1) if axes == 3 else (1,)
        self.start()

    def start(self) -> None:
        """Forget everything: an empty cache."""
        self.length = 0
        self.cache = {
            value.name: onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                [1, value.shape[1], 0, value.shape[3]], TYPES[value.type], self.device, 0
            )
            for value in self.past
        }

    def call(self, embeds: Any) -> dict[str, Any]:
        """Feed embeddings (1, tokens, hidden), an OrtValue on the device, behind the cache. All outputs."""
        positions = np.arange(self.length, self.length + embeds.shape()[1])  # (tokens,)
        positions = np.broadcast_to(positions, (*self.position_shape, len(positions)))
        self.length += embeds.shape()[1]
        binding = self.session.io_binding()
        binding.bind_cpu_input("attention_mask", np.ones((1, self.length), np.int64))
        binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions))
        for name, value in {"inputs_embeds": embeds, **self.cache}.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name, self.device)
        self.session.run_with_iobinding(binding)
        values = dict(zip(self.outputs, binding.get_outputs(), strict=True))
        self.cache = {name: values[name.replace("past_key_values.", "present.")] for name in self.cache}
        return values

    def put(self, array: np.ndarray) -> Any:
        """An array on the device."""
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.device, 0)

    def prompt(self, embeds: np.ndarray) -> Work:
        """A whole prompt (1, tokens, hidden) on an empty cache, until its logits can be read."""
        given = self.put(embeds)

        def work() -> None:
            self.start()
            self.call(given)["logits"].numpy()

        return work

    def step(self, embeds: np.ndarray) -> Work:
        """The prompt's last embedding once more behind it, each time that it is called."""
        self.prompt(embeds)()
        given = self.put(embeds[:, -1:])
        return lambda: self.call(given)["logits"].numpy()

    def second_turn(self, embeds: np.ndarray) -> Work:
        """The prompt's last embeddings, which end in the generation prompt, behind the whole prompt."""
        self.prompt(embeds)()
        given, length, cache = self.put(embeds[:, -TURN:]), self.length, self.cache

        def work() -> None:
            self.length, self.cache = length, cache
            self.call(given)["logits"].numpy()

        return work

    @property
    def bytes_per_token(self) -> int:
        """Of the cache."""
        sizes = (value.shape[1] * value.shape[3] * np.dtype(TYPES[value.type]).itemsize for value in self.past)
        return sum(sizes)


def embeddings(pair: Pair) -> np.ndarray:
    """The text prompt, (1, tokens, hidden), float32."""
    embeds: np.ndarray = pair.plain.get_input_embeddings()(pair.text["input_ids"]).float().numpy()
    return embeds


def write_decoders(pair: Pair, place: Path, dtype: str = "float32") -> dict[str, Path]:
    """Write the plain and the guarded decoder, each in a directory of its own. Returns their paths."""
    from sasa_export.onnx.export import export
    from sasa_export.onnx.plain import decoder_graph, write_model
    from sasa_export.onnx.recipes import recipe_of

    (place / PLAIN).mkdir()
    (place / GUARDED).mkdir()
    gate, found = GateSpec.from_json(pair.guarded.config.sasa), pair.guarded.sasa.probe
    probe = Probe(found.weight.detach().numpy(), float(found.get_buffer("bias")), gate.threshold)
    source = open_source(pair.plain.name_or_path)
    patch = Patch(place, source, LayerGraph(()), gate, probe, None, (), "float32", "cpu")
    told = export(patch, place / GUARDED, opset=23, dtype=dtype, report=Silent()).gate
    paths = {PLAIN: place / PLAIN / "decoder.onnx", GUARDED: place / GUARDED / (told.graphs or {})["decoder"]}
    for model in (pair.plain, pair.guarded):
        model.to(torch.float16 if dtype == "float16" else torch.float32)
    recipe = recipe_of(pair.plain.config.model_type)
    write_model(decoder_graph(pair.plain, recipe, opset=23, dtype=dtype), paths[PLAIN])
    return paths


def costs(pair: Pair, settings: Settings, place: Path) -> list[Row]:
    """The rows on one pair."""
    paths, embeds = write_decoders(pair, place), embeddings(pair)
    plain, guarded = (Decoder(path, threads=settings.threads) for path in paths.values())

    def timed(kind: str, torch_work: Work | None, rounds: int) -> Any:
        work = {"plain": getattr(plain, kind)(embeds), "guarded": getattr(guarded, kind)(embeds)}
        return in_turn(work if torch_work is None else {**work, "torch": torch_work}, rounds, settings.seconds)

    whole = timed("prompt", prefill(pair.guarded, pair.text), settings.rounds)
    second = timed("second_turn", None, settings.rounds)
    steps = timed("step", decoding(pair.guarded, pair.text), settings.new_tokens)
    sizes = {
        name: sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) for name, path in paths.items()
    }
    tokens = f"{embeds.shape[1]} tokens"
    return [
        compare(f"prefill of {tokens} against the plain graph", whole.guarded, whole.plain),
        compare("the same, against the guarded model in torch", whole.guarded, whole.torch),
        compare(
            f"a second turn of {TURN} tokens behind {tokens}, against the plain graph", second.guarded, second.plain
        ),
        compare(f"decoding behind {tokens}, per token, against the plain graph", steps.guarded, steps.plain),
        compare("the same, against the guarded model in torch", steps.guarded, steps.torch),
        compare_sizes("decoder file, against the plain one", sizes[GUARDED], sizes[PLAIN]),
        compare_sizes("cache, per token", guarded.bytes_per_token, plain.bytes_per_token),
    ]


@benchmark("What the gate costs in ONNX")
def main(pair: Pair, settings: Settings, work: Path) -> dict[str, list[Row]]:
    """What the gate costs in ONNX on a CPU, beside a plain export of the same model by the same code, and torch."""
    tables = {f"Opset 23, onnxruntime {onnxruntime.__version__}, CPU": costs(pair, settings, work)}
    early = make_pair(early_layers(pair, settings), work / "early")
    return {**tables, f"The same, {early.settings}": costs(early, settings, work / "early")}


if __name__ == "__main__":
    main()
