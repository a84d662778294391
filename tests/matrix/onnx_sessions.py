"""onnxruntime: sessions of other kinds, other types of the same graphs, and graphs of two types mixed."""

import threading
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from onnx_runner import Runner
from torch import Tensor

from matrix.bench import Inputs
from matrix.by_hand import fed, whole
from matrix.onnx_bench import Graphs, OnnxBench
from matrix.outcome import HOLDS, Outcome, row

RUNTIME, SESSIONS, TYPES = "onnxruntime", "Sessions", "Types and opsets"


def on(bench: OnnxBench, graphs: Graphs) -> Outcome:
    """A batch of both verdicts on other graphs, beside the stock model in torch."""
    return bench.mixed_verdicts(fed(bench), bench.batch(count=6), model=graphs)


@row(RUNTIME, SESSIONS, "logits and past alone asked for, no probability")
def without_probability(bench: OnnxBench) -> Outcome:
    return on(bench, bench.another(outputs=lambda name: name != "unsafe_probability"))


@row(RUNTIME, SESSIONS, "IO binding")
def bound(bench: OnnxBench) -> Outcome:
    return on(bench, bench.another(bound=True))


for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):

    @row(RUNTIME, SESSIONS, f"graph optimisation {level}, parallel execution")
    def optimised(bench: OnnxBench, level: str = level) -> Outcome:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        options.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
        options.log_severity_level = 3
        return on(bench, bench.another(options=options))


@row(RUNTIME, SESSIONS, "two threads at once on one session")
def threads(bench: OnnxBench) -> Outcome:
    inputs, run = bench.batch(count=6), fed(bench)
    _, refused = bench.split(bench.guarded.expected(inputs))
    expected = run(bench.stock, dict(inputs))  # (rows, tokens)
    found: list[Tensor] = []
    workers = [threading.Thread(target=lambda: found.append(run(bench.graphs, dict(inputs)))) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 2, "a thread failed"
    for said in found:
        bench.unchanged(said, expected, refused)
        bench.refused(said, refused)
    return HOLDS


# ------------------------------------------------------------------------------------------ types and opsets


@row(RUNTIME, TYPES, "opset 20")
def old_opset(bench: OnnxBench) -> Outcome:
    return on(bench, bench.of_type("float32", opset=20))


def plain(bench: OnnxBench, dtype: str) -> Graphs:
    """The decoder without the gate, written by the same code in the same type, with the other two graphs beside it."""
    twin = bench.of_type(dtype)
    return Graphs(with_decoder(twin.runner, bench.plain(dtype)), twin.image_token)


def with_decoder(runner: Runner, path: Path) -> Runner:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    runner.decoder = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    runner.names = [value.name for value in runner.decoder.get_outputs()]
    return runner


# How far P(unsafe) may be from float32. What 4 bits leave of random weights says nothing of it.
TOLERANCES = {"float16": 0.02, "int8": 0.15, "int4": None}


def in_type(bench: OnnxBench, dtype: str, run: Any) -> Outcome:
    """Beside the plain graph of the same type; the verdicts are those that the graph's own P(unsafe) calls for."""
    graphs, inputs = bench.of_type(dtype), bench.batch(count=6)
    scores = probability(bench, graphs, inputs)  # (rows,)
    tolerance, remark = TOLERANCES[dtype], "beside a plain graph of the same type"
    if tolerance is not None:
        assert (scores - bench.guarded.expected(inputs)).abs().max() < tolerance
        remark += f", P(unsafe) within {tolerance} of float32"
    return bench.mixed_verdicts(run, inputs, model=graphs, stock=plain(bench, dtype), scores=scores).but(remark)


def probability(bench: OnnxBench, graphs: Graphs, inputs: Inputs) -> Tensor:
    loop = whole(bench, graphs, inputs)
    assert loop.probability is not None and loop.probability.dtype == torch.float32
    return loop.probability


for dtype in TOLERANCES:

    @row(RUNTIME, TYPES, f"{dtype}, whole prompts")
    def whole_in_type(bench: OnnxBench, dtype: str = dtype) -> Outcome:
        return in_type(bench, dtype, fed(bench))

    @row(RUNTIME, TYPES, f"{dtype}, token by token behind the pictures")
    def tokens_in_type(bench: OnnxBench, dtype: str = dtype) -> Outcome:
        return in_type(bench, dtype, fed(bench, 1))


for embedding, decoder in (("float16", "float32"), ("float32", "float16"), ("float16", "int8"), ("int8", "float32")):

    @row(RUNTIME, TYPES, f"embedding in {embedding}, decoder in {decoder}, token by token")
    def types_mixed(bench: OnnxBench, embedding: str = embedding, decoder: str = decoder) -> Outcome:
        """As runtimes that pick a type a graph do: the gate reads the words off the embeddings that it gets."""
        graphs = bench.of_type(decoder)
        graphs.runner.embedding = bench.of_type(embedding).runner.embedding
        inputs = bench.batch(count=6, images=False)
        pieces = fed(bench, 1)
        at_once = probability(bench, graphs, inputs)  # (rows,)
        _, refused = bench.split(at_once)
        found = pieces(graphs, dict(inputs))
        bench.refused(found, refused)
        bench.unchanged(found, fed(bench)(graphs, dict(inputs)), refused)
        return HOLDS.but("token by token as at once")
