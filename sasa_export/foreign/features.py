"""What the graphs themselves show: whether the second lane is what it should be, and what a probe reads of prompts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from sasa_export.errors import TraceError
from sasa_export.foreign.blocks import OTHER, Blocks
from sasa_export.foreign.decoder import Decoder, load_blocks
from sasa_export.foreign.lane import LANE, Builder, add_head, add_lane, clone
from sasa_export.graph.rewrite import LaneSettings
from sasa_export.probe import Fitted, fit_probes
from sasa_export.probe.features import Features
from sasa_export.probe.fit import head_metric
from sasa_export.probe.work import Results, Work
from sasa_export.prompts.prompt import Prompt, encoded
from sasa_export.report import Check, Silent
from sasa_export.verify.fresh.onnx_model import Model, session
from sasa_export.writers.cases import TOKENS, Asked, Case

SELF_TEST = Prompt("self-test", "Which of these two is larger, and why?", 0, "self-test")
SAME, ROUNDED = 1e-4, 2e-2  # of the largest state, where the cache is float32, and where it is narrower


def run(decoder: Decoder, blocks: Blocks, outputs: dict[str, ir.Value] | None = None) -> Model:
    """The graphs with a decoder as it is in memory, whose weights stay in their files; with other `outputs` than its
    own, they are float32."""
    graph, graphs = blocks.model.graph, decoder.graphs
    if outputs is not None:
        graph.outputs.clear()
        for name, value in outputs.items():
            wide = Builder(graph, f"/sasa/{name}")("Cast", value, to=ir.DataType.FLOAT)
            wide.name, wide.type = name, ir.TensorType(ir.DataType.FLOAT)
            graph.outputs.append(wide)
    graph.sort()
    common.RemoveUnusedNodesPass()(blocks.model)
    held, folder = ir.serde.serialize_model(blocks.model), graphs.decoder.resolve().parent
    for entry in (entry for tensor in held.graph.initializer for entry in tensor.external_data):
        if entry.key == "location":  # onnxruntime follows no links, such as those of the hub's cache, out of the folder
            entry.value = os.path.relpath((graphs.decoder.parent / entry.value).resolve(), folder)
    ready = session(held.SerializeToString(), "cpu", folder)
    return Model(graphs.source.directory, "", "cpu", {"graphs": graphs.files, "lengths": blocks.lengths}, ready)


def check_lane(decoder: Decoder, settings: LaneSettings) -> float:
    """How far from the main lane's end the second one ends, of the largest state, where it begins with the very state
    behind the safety layer. TraceError where it is too far, or where the lane does not care what it begins with."""
    blocks, inputs = load_blocks(decoder.graphs), encoded(decoder.processor, SELF_TEST)
    assert settings.pair is not None
    first, positions = settings.pair[0], blocks.inputs.get("position_ids")
    ends = {
        name: add_lane(blocks, first, blocks.states[index], positions, f"{LANE}/{name}")
        for name, index in zip(("same", "other"), settings.pair, strict=True)
    }
    values = run(decoder, blocks, {"main": blocks.norm, **ends}).prompt(inputs)
    main, same, other = (values[name].numpy() for name in ("main", *ends))  # (1, tokens, hidden) each
    if main.shape != (*inputs["input_ids"].shape, decoder.sizes.hidden) or same.shape != main.shape:
        raise TraceError(f"{blocks.norm.name} is {main.shape}, so it is no final norm of all tokens. {OTHER}")
    apart, control = (float(np.abs(end - main).max() / np.abs(main).max()) for end in (same, other))
    most = SAME if decoder.dtype == "float32" else ROUNDED
    if not apart <= most < control:
        raise TraceError(
            f"{blocks.states[first].name}: begun with what lies behind block {first}, the second lane ends {apart:.1e} "
            f"from the main lane, where at most {most:g} may be, and begun with another state {control:.1e}. {OTHER}"
        )
    return apart


def lanes(decoder: Decoder, settings: LaneSettings, *, logits: bool = True) -> Model:
    """The graphs with both lanes' first-token features as outputs, "projected" and "plain", (1, features): normed
    states, or, where a probe does not fold through the head, `logits`."""
    blocks = load_blocks(decoder.graphs)
    add = Builder(blocks.model.graph, "/sasa/features")
    assert settings.pair is not None
    safety, semantic = (add("Cast", blocks.states[index], to=ir.DataType.FLOAT) for index in settings.pair)
    axis, least, last = add.constant([-1]), add.constant(settings.epsilon, np.float32), add.constant(-1)
    along, square = (add("ReduceSum", add("Mul", state, semantic), axis, keepdims=1) for state in (safety, semantic))
    projection = add("Mul", add("Div", along, add("Max", square, least)), semantic)  # (1, tokens, hidden)
    end = add_lane(blocks, settings.pair[0], projection, blocks.inputs.get("position_ids"))
    ends = {"projected": add("Gather", end, last, axis=1), "plain": add("Gather", blocks.norm, last, axis=1)}
    if logits and not decoder.linear:
        ends = {name: add_head(blocks, value, f"/sasa/{name}") for name, value in ends.items()}
    return run(decoder, blocks, ends)


def original(decoder: Decoder) -> Model:
    """The graphs as they are."""
    return run(decoder, load_blocks(decoder.graphs))


def collect(
    reading: Model, prompts: Sequence[Prompt], work: Work, report: Silent, *, batch_size: int, kind: str = "calibrate"
) -> Features:
    """What both lanes make of each prompt, by the graphs of `lanes`; what is finished is kept in `work`."""
    names, results = ("projected", "plain"), Results(work, kind, prompts, batch_size)

    def compute(some: list[Prompt], missing: list[str]) -> Iterator[tuple[str, np.ndarray]]:
        return ((name, values) for name, values in read(reading, some, names).items() if name in missing)

    results.fill(names, compute, report)
    return Features(*map(results.read, names))


def read(reading: Model, prompts: Sequence[Prompt], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Outputs of graphs by name, (prompts, ...) each, one prompt after the other."""
    found = [reading.prompt(encoded(reading.processor, prompt)) for prompt in prompts]
    return {name: np.concatenate([values[name].numpy() for values in found]) for name in names}


def fit_graphs(decoder: Decoder, found: Features, prompts: Sequence[Prompt], regularization: float | None) -> Fitted:
    """Probes on what `collect` gave, in the metric of the decoder's head, where it has one."""
    metric = head_metric(head_weight(decoder)) if decoder.linear else None
    return fit_probes({"projected": found.projected, "plain": found.plain}, prompts, metric, regularization)


def head_weight(decoder: Decoder) -> np.ndarray:
    """The head's weights, (vocabulary, hidden), float32, however they are stored: what it makes of unit vectors."""
    blocks, hidden = load_blocks(decoder.graphs), decoder.sizes.hidden
    graph, head, add = blocks.model.graph, blocks.head, Builder(blocks.model.graph, "/sasa/units")
    kinds = [blocks.read.dtype, *(value.dtype for value in head.inputs if value is not None)]
    kind = next((kind for kind in kinds if kind is not None and kind.is_floating_point()), ir.DataType.FLOAT)
    rows = np.eye(hidden + 1, hidden, dtype=np.float32)  # the last is 0: a bias is no weight
    rows = rows if head.op_type == "Gemm" else rows[None]
    units = ir.Value(name="units", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(rows.shape))
    made = clone(graph, head.outputs[0], {blocks.read: add("Cast", units, to=kind)}, "/sasa/units")
    graph.inputs.clear()
    graph.inputs.append(units)
    logits = run(decoder, blocks, {"head": made}).decoder.run(None, {"units": rows})[0].reshape(hidden + 1, -1)
    return (logits[:-1] - logits[-1]).T


def ask_graphs(as_it_was: Model, reading: Model, prompt: Prompt) -> Asked:
    """What `writers.cases.expect` wants to know of the graphs, by those of `original` and of `lanes`."""
    inputs = encoded(reading.processor, prompt)
    _, first, tokens = as_it_was.answer(inputs, TOKENS)
    return reading.prompt(inputs)["projected"].numpy(), first, tokens, ()


def check_pieces(decoder: Decoder, directory: Path, cases: Sequence[Case], opened: bool, most: float) -> Check:
    """Whether P(unsafe) depends on how a prompt is cut into calls. Where the template opens an answer (`opened`), the
    last call brings one token alone, which has to be recognised as the end of a prompt."""
    name, model, apart = "P(unsafe) is the same in pieces", Model(directory, "", "cpu"), 0.0
    for case in cases:
        inputs = encoded(model.processor, case.prompt)
        count = inputs["input_ids"].shape[1]
        cuts = [count // 2, count - 1] if opened else [count // 2]
        try:
            found = model.judge(inputs, cuts)
        except Exception as error:
            said = f"a later call fails: {' '.join(str(error).split())[:200]}"
            try:  # some decoders take several tokens in their first call alone
                original(decoder).prompt(inputs, cuts)
            except Exception:
                return Check(name, None, f"not checked, since the original fails likewise: {said}")
            return Check(name, False, said)
        apart = max(apart, abs(found - case.unsafe_probability)) if np.isfinite(found) else np.inf
    return Check(name, apart <= most, f"largest difference {apart:.1e} over {len(cases)} prompts, tolerance {most:g}")
