"""onnxruntime: sessions of other kinds, other types of the same graphs, and graphs of two types mixed."""

import threading
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from onnx_runner import Runner
from torch import Tensor
from transformers import AutoModelForImageTextToText

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
    found: list[Outcome] = []
    workers = [threading.Thread(target=lambda: found.append(on(bench, bench.graphs))) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [HOLDS, HOLDS]
    return HOLDS


# ------------------------------------------------------------------------------------------ types and opsets


@row(RUNTIME, TYPES, "opset 20")
def old_opset(bench: OnnxBench) -> Outcome:
    return on(bench, bench.of_type("float32", opset=20))


def plain(bench: OnnxBench, dtype: str) -> Graphs:
    """The decoder without the gate, written by the same code in the same type, with the other two graphs beside it."""
    from sasa_export.emit.onnx.graphs import decoder_graph, write_model
    from sasa_export.emit.onnx.layout import stock_type
    from sasa_export.emit.onnx.recipes import recipe_of

    kind = torch.float16 if dtype == "float16" else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(
        bench.guarded.directory, dtype=kind, trust_remote_code=True, attn_implementation="sdpa"
    ).eval()
    graph = decoder_graph(model, recipe_of(stock_type(model.config.model_type)), opset=23, dtype=dtype, guarded=False)
    path = bench.scratch() / "decoder_model_merged.onnx"
    write_model(graph, path)
    twin = bench.of_type(dtype)
    return Graphs(with_decoder(twin.runner, path), twin.image_token)


def with_decoder(runner: Runner, path: Path) -> Runner:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    runner.decoder = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    runner.names = [value.name for value in runner.decoder.get_outputs()]
    return runner


def in_type(bench: OnnxBench, dtype: str, run: Any) -> Outcome:
    """Beside the plain graph of the same type; the verdicts are those that the graph's own P(unsafe) calls for."""
    graphs, inputs = bench.of_type(dtype), bench.batch(count=6)
    scores = probability(bench, graphs, inputs)  # (rows,)
    tolerance = {"float16": 0.02, "int8": 0.15}[dtype]
    assert (scores - bench.guarded.expected(inputs)).abs().max() < tolerance
    found = bench.mixed_verdicts(run, inputs, model=graphs, stock=plain(bench, dtype), scores=scores)
    return found.but("beside a plain graph of the same type, P(unsafe) within the tolerance of the export")


def probability(bench: OnnxBench, graphs: Graphs, inputs: Inputs) -> Tensor:
    loop = whole(bench, graphs, inputs)
    assert loop.probability is not None and loop.probability.dtype == torch.float32
    return loop.probability


for dtype in ("float16", "int8"):

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
