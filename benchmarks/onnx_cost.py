"""What the guard costs in ONNX on a CPU, against a plain export of the same model by the same code without the passes.

    python benchmarks/onnx_cost.py --patched patched/ [--tokens 256] [--steps 32] [--rounds 7]

Both sessions run side by side in one process, round by round in alternating order, and ratios are of the medians. All
figures are also given as JSON on the last line.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from transformers import AutoModelForImageTextToText

from sasa_export.emit.onnx.graphs import decoder_graph, write_model
from sasa_export.emit.onnx.layout import stock_type
from sasa_export.emit.onnx.recipes import recipe_of


class Session:
    """A decoder that is fed `tokens` of random prompt and then single tokens; times in seconds."""

    def __init__(self, path: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.empty = {
            value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
            for value in self.session.get_inputs()
            if value.name.startswith("past_key_values.")
        }
        self.names = [value.name for value in self.session.get_outputs()]
        axes = {value.name: len(value.shape) for value in self.session.get_inputs()}["position_ids"]
        self.position_shape = (3, 1) if axes == 3 else (1,)

    def call(self, embeds: np.ndarray, cache: dict[str, Any], start: int) -> tuple[float, dict[str, Any]]:
        count = embeds.shape[1]
        positions = np.broadcast_to(np.arange(start, start + count), (*self.position_shape, count))
        feed = {
            "inputs_embeds": embeds,
            "attention_mask": np.ones((1, start + count), np.int64),
            "position_ids": np.ascontiguousarray(positions),
            **cache,
        }
        before = time.perf_counter()
        values = self.session.run(None, feed)
        spent = time.perf_counter() - before
        grown = {
            name.replace("present.", "past_key_values."): value
            for name, value in zip(self.names, values, strict=True)
            if name.startswith("present.")
        }
        return spent, grown

    def round(self, prompt: np.ndarray, token: np.ndarray, steps: int) -> tuple[float, float]:
        """Seconds of the prompt, and of the median step after it."""
        first, cache = self.call(prompt, self.empty, 0)
        spent = []
        for step in range(steps):
            seconds, cache = self.call(token, cache, prompt.shape[1] + step)
            spent.append(seconds)
        return first, statistics.median(spent)


def measure(patched: Path, tokens: int, steps: int, rounds: int, threads: int, opset: int) -> dict[str, Any]:
    model = AutoModelForImageTextToText.from_pretrained(patched, dtype=torch.float32, trust_remote_code=True).eval()
    recipe = recipe_of(stock_type(model.config.model_type))
    text = model.config.get_text_config(decoder=True)
    with tempfile.TemporaryDirectory() as scratch:
        sessions, sizes = {}, {}
        for name, guarded in (("plain", False), ("guarded", True)):
            path = Path(scratch, name) / "decoder.onnx"
            path.parent.mkdir()
            write_model(decoder_graph(model, recipe, opset=opset, guarded=guarded), path)
            sizes[name] = sum(file.stat().st_size for file in path.parent.iterdir())
            sessions[name] = Session(path, threads)
        draw = np.random.default_rng(0)
        scale = float(model.get_input_embeddings().weight.detach().std())
        prompt = (draw.standard_normal((1, tokens, text.hidden_size)) * scale).astype(np.float32)
        prefill: dict[str, list[float]] = {name: [] for name in sessions}
        decode: dict[str, list[float]] = {name: [] for name in sessions}
        for turn in range(rounds + 1):
            for name in sorted(sessions, reverse=bool(turn % 2)):
                first, step = sessions[name].round(prompt, prompt[:, :1], steps)
                if turn:  # the first round warms up
                    prefill[name].append(first)
                    decode[name].append(step)
    blocks, safety = text.num_hidden_layers, model.config.sasa["safety_layer"]
    middle = {kind: {name: statistics.median(values) for name, values in times.items()}
              for kind, times in (("prefill", prefill), ("decode", decode))}  # fmt: skip
    return {
        "model": model.config.model_type, "blocks": blocks, "safety_layer": safety, "tokens": tokens, "steps": steps,
        "rounds": rounds, "threads": threads, "opset": opset,
        "prefill_seconds": middle["prefill"], "decode_seconds": middle["decode"], "bytes": sizes,
        "prefill_ratio": middle["prefill"]["guarded"] / middle["prefill"]["plain"],
        "prefill_floor": (blocks + blocks - 1 - safety) / blocks,
        "decode_ratio": middle["decode"]["guarded"] / middle["decode"]["plain"],
        "size_ratio": sizes["guarded"] / sizes["plain"],
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The guard's cost in ONNX on a CPU.")
    parser.add_argument("--patched", type=Path, required=True, help="a guarded safetensors directory")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--opset", type=int, default=23)
    given = parser.parse_args()
    figures = measure(given.patched, given.tokens, given.steps, given.rounds, given.threads, given.opset)
    print(f"prefill x {figures['prefill_ratio']:.3f} (by block count {figures['prefill_floor']:.3f})")
    print(f"decode  x {figures['decode_ratio']:.3f}")
    print(f"size    x {figures['size_ratio']:.4f}")
    print(json.dumps(figures))
