"""onnxruntime, `--gate every-token`: an answer is judged at each of its tokens, in whatever way it is said."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_runner import session
from torch import Tensor

from matrix.bench import EVERY, Bench
from matrix.by_hand import fed
from matrix.onnx_bench import Graphs, OnnxBench
from matrix.outcome import Outcome, row
from matrix.torch_every_token import answered_twice, at_each_token, last_token_alone, side_by_side

RUNTIME, SECTION = "onnxruntime", "Every token judged"


@dataclass(frozen=True)
class Retuned(OnnxBench):
    """A bench whose threshold is changed within the graph itself, for as long as a row wants it."""

    @contextmanager
    def threshold(self, value: float, *models: Any) -> Iterator[None]:
        runner = self.graphs.runner
        before = runner.decoder
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "decoder.onnx")
            retune(self.directories() / "onnx" / "decoder_model_merged.onnx", self.written, value, path)
            runner.decoder = session(path)
            try:
                yield
            finally:
                runner.decoder = before

    split = Bench.split
    between = Bench.between


def retune(path: Path, before: float, value: float, out: Path) -> None:
    """Write a graph again with another threshold."""
    model = ir.load(path)
    found = [
        (node, index, tensor)
        for node in model.graph.all_nodes()
        if node.op_type in ("Less", "GreaterOrEqual")
        for index, tensor in enumerate(node.inputs)
        if tensor is not None
        and tensor.const_value is not None
        and tensor.const_value.size == 1
        and np.float32(tensor.const_value.numpy().item()) == np.float32(before)
    ]
    assert len(found) == 1, f"{len(found)} comparisons with the threshold"
    node, index, old = found[0]
    assert old.const_value is not None
    new = ir.Value(name="retuned", const_value=ir.tensor(np.float32(value).reshape(old.const_value.shape.numpy())))
    new.shape, new.type = old.shape, old.type
    model.graph.register_initializer(new)
    node.replace_input_with(index, new)
    ir.save(model, out)


@row(RUNTIME, SECTION, "every token: greedy search", EVERY)
def greedy(bench: Retuned) -> Outcome:
    return at_each_token(bench, fed(bench))


for size in (1, 3):
    row(RUNTIME, SECTION, f"every token: chunks of {size}")(
        lambda bench, size=size: at_each_token(bench, fed(bench, size))
    )


@row(RUNTIME, SECTION, "every token: embeddings of one's own, token by token")
def embedded(bench: Retuned) -> Outcome:
    return at_each_token(bench, fed(bench, 1, embedded=True))


@row(RUNTIME, SECTION, "every token: answer, cut into the prompt, answer again")
def cut(bench: Retuned) -> Outcome:
    return answered_twice(bench)


@row(RUNTIME, SECTION, "every token: mixed verdicts in one batch", ("llava", "qwen2_5_vl"))
def mixed(bench: Retuned) -> Outcome:
    return side_by_side(bench, fed(bench))


@row(RUNTIME, SECTION, "every token: text without the chat template, the last token on its own")
def raw_last_token(bench: Retuned) -> Outcome:
    return last_token_alone(bench)


@row(RUNTIME, SECTION, "every token: logits and past alone asked for, no probability")
def without_probability(bench: Retuned) -> Outcome:
    graphs = Graphs(bench.graphs.runner, bench.graphs.image_token, outputs=lambda name: name != "unsafe_probability")

    def run(model: Any, inputs: Any) -> Tensor:
        return fed(bench)(graphs if model is bench.model else model, inputs)

    with torch.no_grad():
        return at_each_token(bench, run)
