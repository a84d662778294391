"""What the graphs themselves show: whether the second lane is what it should be, and what a probe reads of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from sasa_export.errors import TraceError
from sasa_export.foreign.blocks import OTHER, Blocks
from sasa_export.foreign.decoder import Decoder, load_blocks
from sasa_export.foreign.lane import LANE, Builder, add_head, add_lane, clone
from sasa_export.foreign.opened import Graphs
from sasa_export.graph.rewrite import LaneSettings
from sasa_export.probe import Fitted, fit_probes
from sasa_export.probe.features import Features
from sasa_export.probe.fit import Probe, head_metric, probability
from sasa_export.probe.work import Results, Work
from sasa_export.prompts.prompt import Prompt, encode
from sasa_export.report import Check, Silent
from sasa_export.verify.fresh.onnx_model import Model, session
from sasa_export.writers.cases import LOGITS, TOKENS, Case, choose

SAME, ROUNDED = 1e-4, 2e-2  # of the largest state, where the cache is float32, and where it is narrower


def run(graphs: Graphs, blocks: Blocks, outputs: dict[str, ir.Value] | None = None) -> Model:
    """The directory with a decoder as it is in memory; with other `outputs` than its own, they are float32."""
    graph = blocks.model.graph
    if outputs is not None:
        graph.outputs.clear()
        for name, value in outputs.items():
            wide = Builder(graph, f"/sasa/{name}")("Cast", value, to=ir.DataType.FLOAT)
            wide.name, wide.type = name, ir.TensorType(ir.DataType.FLOAT)
            graph.outputs.append(wide)
    return Model(graphs.source.directory, "", "cpu", graphs.files, _session(graphs, blocks))


def _session(graphs: Graphs, blocks: Blocks) -> Any:
    """The decoder in memory, ready to run; its weights stay in their files."""
    blocks.model.graph.sort()
    common.RemoveUnusedNodesPass()(blocks.model)
    return session(ir.serde.serialize_model(blocks.model).SerializeToString(), "cpu", graphs.decoder.parent)


def check_lane(graphs: Graphs, settings: LaneSettings, inputs: dict[str, Any]) -> float:
    """How far from the main lane's end the second one ends, of the largest state, where it begins with the very state
    behind the safety layer. TraceError where it is too far, or where the lane does not care what it begins with.

    Args: inputs: a prompt's.
    """
    blocks, pair = load_blocks(graphs), settings.pair
    assert pair is not None
    positions, kind = blocks.inputs.get("position_ids"), next(iter(blocks.past.values())).dtype
    begun = dict(zip(("same", "other"), (blocks.states[index] for index in pair), strict=True))
    ends = {name: add_lane(blocks, pair[0], state, positions, f"{LANE}/{name}") for name, state in begun.items()}
    values = run(graphs, blocks, {"main": blocks.norm, **ends}).prompt(inputs)
    main, same, other = (values[name].numpy() for name in ("main", *ends))  # (1, tokens, hidden) each
    if not inputs["input_ids"].shape == main.shape[:2] == same.shape[:2]:
        raise TraceError(f"{blocks.norm.name} is {main.shape}, so it is no final norm of all tokens. {OTHER}")
    largest = np.abs(main).max()
    apart, control = (float(np.abs(end - main).max() / largest) for end in (same, other))
    most = SAME if kind == ir.DataType.FLOAT else ROUNDED
    if not apart <= most < control:
        raise TraceError(
            f"{blocks.states[pair[0]].name}: begun with what lies behind block {pair[0]}, the second lane ends "
            f"{apart:.1e} from the main lane, where at most {most:g} may be, and begun with another state "
            f"{control:.1e}. {OTHER}"
        )
    return apart


def lanes(graphs: Graphs, settings: LaneSettings) -> Model:
    """The graphs with both lanes' first-token features as outputs, "projected" and "plain", (1, features)."""
    blocks, pair = load_blocks(graphs), settings.pair
    assert pair is not None
    add = Builder(blocks.model.graph, "/sasa/features")
    safety, semantic = (add("Cast", blocks.states[index], to=ir.DataType.FLOAT) for index in pair)
    axis, least = add.constant([-1]), add.constant(settings.epsilon, np.float32)
    along, square = (add("ReduceSum", add("Mul", state, semantic), axis, keepdims=1) for state in (safety, semantic))
    projection = add("Mul", add("Div", along, add("Max", square, least)), semantic)  # (1, tokens, hidden)
    end = add_lane(blocks, pair[0], projection, blocks.inputs.get("position_ids"))
    last = add.constant(-1)
    ends = {"projected": add("Gather", end, last, axis=1), "plain": add("Gather", blocks.norm, last, axis=1)}
    if not blocks.linear:
        ends = {name: add_head(blocks, value, f"/sasa/{name}") for name, value in ends.items()}
    return run(graphs, blocks, ends)


def encoded(processor: Any, prompt: Prompt) -> dict[str, np.ndarray]:
    """A prompt's inputs, without padding."""
    return {name: tensor.numpy() for name, tensor in encode(processor, [prompt]).items()}


def collect(model: Model, prompts: Sequence[Prompt], work: Work, report: Silent, *, batch_size: int) -> Features:
    """What both lanes make of each prompt, by the graphs of `lanes`; what is finished is kept in `work`."""
    names, results = ("projected", "plain"), Results(work, "calibrate", prompts, batch_size)

    def compute(some: list[Prompt], missing: list[str]) -> Iterator[tuple[str, np.ndarray]]:
        found = [model.prompt(encoded(model.processor, prompt)) for prompt in some]
        return ((name, np.concatenate([values[name].numpy() for values in found])) for name in missing)

    results.fill(names, compute, report)
    return Features(*map(results.read, names))


def fit_graphs(decoder: Decoder, found: Features, prompts: Sequence[Prompt], regularization: float | None) -> Fitted:
    """Probes on what `collect` gave, in the metric of the decoder's head, where it has one."""
    metric = head_metric(head_weight(decoder.graphs, decoder.sizes.hidden)) if decoder.linear else None
    return fit_probes({"projected": found.projected, "plain": found.plain}, prompts, metric, regularization)


def expect_graphs(
    graphs: Graphs, reading: Model, probe: Probe, prompts: Sequence[Prompt], scores: np.ndarray | None
) -> Iterator[Case]:
    """Cases of verification: P(unsafe) by the graphs of `lanes`, and the greedy answer of the decoder as it was."""
    original = run(graphs, load_blocks(graphs))
    calibrated = (
        {} if scores is None else dict(zip((prompt.name for prompt in prompts), map(float, scores), strict=True))
    )
    for prompt in choose(prompts, scores):
        inputs = encoded(reading.processor, prompt)
        state = reading.prompt(inputs)["projected"].numpy().astype(np.float64)  # (1, features)
        score = float(probability(state, probe.weight.astype(np.float64), probe.bias)[0])
        _, first, tokens = original.answer(inputs, TOKENS)
        largest = np.argsort(first)[::-1][:LOGITS]
        logits = tuple((int(token), float(first[token])) for token in largest)
        yield Case(prompt, score, tuple(tokens), logits, calibrated.get(prompt.name))


def check_pieces(directory: Path, cases: Sequence[Case], opened: bool, most: float) -> Check:
    """Whether P(unsafe) depends on how a prompt is cut into calls. Where the template opens an answer (`opened`), the
    last call brings one token alone, which has to be recognised as the end of a prompt."""
    model, apart = Model(directory, "", "cpu"), 0.0
    for case in cases:
        inputs = encoded(model.processor, case.prompt)
        count = inputs["input_ids"].shape[1]
        found = model.judge(inputs, [count // 2, count - 1] if opened else [count // 2])
        apart = max(apart, abs(found - case.unsafe_probability)) if np.isfinite(found) else np.inf
    said = f"largest difference {apart:.1e} over {len(cases)} prompts, tolerance {most:g}"
    return Check("P(unsafe) is the same in pieces", apart <= most, said)


def head_weight(graphs: Graphs, hidden: int) -> np.ndarray:
    """The head's weights, (vocabulary, hidden), float32, however they are stored: what it makes of unit vectors."""
    blocks = load_blocks(graphs)
    graph, head = blocks.model.graph, blocks.head
    shape = [hidden + 1, hidden] if head.op_type == "Gemm" else [1, hidden + 1, hidden]
    units = ir.Value(name="units", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
    narrow = Builder(graph, "/sasa/units")("Cast", units, to=_type_of(blocks))
    made = clone(graph, head.outputs[0], {blocks.read: narrow}, "/sasa/units")
    found = Builder(graph, "/sasa/unit_logits")("Cast", made, to=ir.DataType.FLOAT)
    found.type = ir.TensorType(ir.DataType.FLOAT)
    for values in (graph.inputs, graph.outputs):
        values.clear()
    graph.inputs.append(units)
    graph.outputs.append(found)
    decoder = _session(graphs, blocks)
    rows = np.concatenate([np.eye(hidden, dtype=np.float32), np.zeros((1, hidden), np.float32)])  # a bias is no weight
    logits = decoder.run(None, {"units": rows.reshape(shape)})[0].reshape(hidden + 1, -1)
    return (logits[:-1] - logits[-1]).T


def _type_of(blocks: Blocks) -> ir.DataType:
    """The type of the head's states: as the graph notes it, or that of the numbers it multiplies them by."""
    kinds = [blocks.read.dtype, *(value.dtype for value in blocks.head.inputs if value is not None)]
    return next((kind for kind in kinds if kind is not None and kind.is_floating_point()), ir.DataType.FLOAT)
