"""ONNX graphs that others exported, in place of a torch model. All commands work on the graphs themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from sasa_export.errors import EmitError, EvaluateError, reworded
from sasa_export.gate import GateSpec
from sasa_export.graph.rewrite import LaneSettings
from sasa_export.layers.pairs import Pair
from sasa_export.layers.prompts import controls
from sasa_export.layers.survey import LIKELIEST, MAIN_LANE, Evidence, evidence_of
from sasa_export.layers.sweep import second_lane
from sasa_export.onnx.decoder import Decoder
from sasa_export.onnx.export import put_gate
from sasa_export.onnx.lane import Builder, add_head, add_lane, clone
from sasa_export.onnx.opened import open_graphs
from sasa_export.onnx.run import Model
from sasa_export.onnx.splice import FAR, guarded_decoder
from sasa_export.options import REACH, Options
from sasa_export.probe.calibration import Fitted, fit_probes
from sasa_export.probe.features import Features
from sasa_export.probe.fit import head_metric
from sasa_export.probe.work import Results, Work
from sasa_export.prompts import for_model
from sasa_export.prompts.prompt import Prompt, encoded
from sasa_export.report import Check, Silent
from sasa_export.verify.compare import QUANTIZED, ROUNDED
from sasa_export.verify.fresh.onnx_model import generation
from sasa_export.workers import workers
from sasa_export.writers.cases import TOKENS, Asked
from sasa_export.writers.directory import Patch, Written, write_beside
from sasa_export.writers.weights import bring

Arrays = Iterator[tuple[str, np.ndarray]]


class OnnxModel:
    """The ONNX graphs of a directory, as `backends.Answering` describes it. They run one prompt at a time."""

    def __init__(self, model: Any, directory: Path) -> None:
        self.model, self.processor, self.directory = model, model.processor, directory

    def answers(self, prompts: Sequence[Prompt], longest: int) -> dict[str, np.ndarray]:
        """Raise EvaluateError for unsupported generation settings."""
        if changes := generation(self.directory)[1]:
            raise EvaluateError(
                f"generation_config.json of {self.directory} sets {', '.join(changes)}, which "
                "is not followed here, so its answers would not be the original's. Evaluate the safetensors directory."
            )
        tokens, scores = np.full((len(prompts), longest), -1), np.zeros(len(prompts))
        for row, prompt in enumerate(prompts):
            scores[row], _, said = self.model.answer(encoded(self.processor, prompt), longest)
            tokens[row, : len(said)] = said
        return {"tokens": tokens, "scores": scores}

    def judge(self, prompts: Sequence[Prompt]) -> np.ndarray:
        return np.array([self.model.judge(encoded(self.processor, prompt)) for prompt in prompts])


def explained(model: str) -> AbstractContextManager[None]:
    """Return the context for graphs of others: onnxruntime and the exporter raise errors of many types."""
    return reworded(EmitError, f"{model} cannot be guarded here ({{reason}}). Use another model.")


class GraphOriginal(Decoder):
    """ONNX graphs, with what `backends.Original` asks for."""

    device = "cpu"

    def __init__(self, model: str, chosen: Sequence[str] = ()) -> None:
        with explained(model):
            super().__init__(open_graphs(model, chosen))
        self.more: Mapping[str, Any] = {"graphs": self.graphs.files, "lengths": self.lengths, "dtype": self.dtype}

    def explained(self) -> AbstractContextManager[None]:
        return explained(self.source.name)

    def readable(self, prompts: Sequence[Prompt], report: Silent) -> list[Prompt]:
        found = [prompt for prompt in prompts if self.sees or prompt.image is None]
        if len(found) < len(prompts):
            report.warn("pictures cannot be run through these graphs here, so only prompts of text are used.")
        return for_model(found, self.processor, report)

    def loaded(self, prompts: Sequence[Prompt], report: Silent) -> AbstractContextManager[None]:
        """Do nothing. Graphs are loaded later, together with the nodes that are added to them."""
        return nullcontext()

    def survey(
        self, prompts: Sequence[Prompt], pairs: Sequence[Pair], work: Work, report: Silent,
        *, batch_size: int, regularization: float | None = None, tokens: int = REACH,
    ) -> Evidence | None:  # fmt: skip
        """Run the pairs one after the other, since each pair's graph takes its own memory."""
        results = Results(work, "prompts", prompts, batch_size)
        on_controls = Results(work, "controls", controls(prompts), batch_size)
        for number, pair in enumerate(pairs):
            report.step(
                "", f"second lane {number + 1} of {len(pairs)}: safety layer {pair[0]}, semantic layer {pair[1]}"
            )
            lane = LaneSettings(*pair, tokens=tokens)
            self._fill(results, {second_lane(pair): "projected"}, lane, report, alone=True)
        main, head = self.behind_blocks(), self.head_weight()  # (vocabulary, hidden)

        def compute(some: list[Prompt], missing: list[str]) -> Arrays:
            found = read(main, some, ["states", "normed"])  # (rows, blocks, hidden) each
            likeliest = (torch.from_numpy(found["normed"]) @ torch.from_numpy(head).T).topk(LIKELIEST).indices
            yield "tokens", likeliest.numpy().astype(np.int32)
            yield "plain", found["normed"][:, -1]
            yield "states", found["states"]

        for each in (results, on_controls):
            each.fill(MAIN_LANE, compute, report)
        if not workers().leads:
            return None
        return evidence_of(results, on_controls, pairs, head, self.processor, regularization, report)

    def features(
        self, settings: LaneSettings, prompts: Sequence[Prompt], work: Work, report: Silent,
        *, batch_size: int, kind: str = "calibrate",
    ) -> Features:  # fmt: skip
        results = Results(work, kind, prompts, batch_size)
        outputs = {f"{name}-{settings.safety_layer}-{settings.semantic_layer}": name for name in ("projected", "plain")}
        self._fill(results, outputs, settings, report)
        return Features(*map(results.read, outputs))

    def fit(
        self, settings: LaneSettings, features: Features, prompts: Sequence[Prompt], regularization: float | None
    ) -> Fitted:
        metric = head_metric(self.head_weight()) if self.linear else None
        return fit_probes({"projected": features.projected, "plain": features.plain}, prompts, metric, regularization)

    def asking(self, settings: LaneSettings) -> Callable[[Prompt], Asked]:
        as_it_was, lanes = self.run(self.blocks()), self.lanes(settings)

        def ask(prompt: Prompt) -> Asked:
            inputs = encoded(self.processor, prompt)
            _, first, tokens = as_it_was.answer(inputs, TOKENS)
            return lanes.prompt(inputs)["projected"].numpy(), first, tokens, ()

        return ask

    def answering(self) -> OnnxModel:
        return OnnxModel(self.run(self.blocks()), self.source.directory)

    def unchanged(self, gate: GateSpec) -> list[Path]:
        return [shard.path for shard in self.source.shards if shard.path != self.graphs.decoder]

    def write(self, patch: Patch, staging: Path, options: Options, report: Silent) -> Iterator[Written]:
        guarded = guarded_decoder(self, patch.gate, patch.probe)
        digests: dict[str, str | None] = {}
        write_beside(patch, staging)
        with report.bar(patch.source.weight_bytes(), "write") as advance:
            for source in self.unchanged(patch.gate):
                name = source.relative_to(self.source.directory)
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                digests[name.as_posix()] = bring(source, staging / name, link=options.link, advance=advance)
        (staging / self.graphs.files["decoder"]).parent.mkdir(parents=True, exist_ok=True)
        put_gate(self, guarded, patch, staging)
        yield Written(patch, staging, digests)

    def more_checks(self, written: Written) -> list[Check]:
        """Check that P(unsafe) does not depend on how a prompt is cut into calls. If the template opens an answer, the
        last call has a single token, which the gate must recognise as the end of the prompt."""
        name, apart, cases, gate = "P(unsafe) is the same in pieces", 0.0, written.patch.cases, written.patch.gate
        if not cases:
            return []
        model = Model(written.directory)
        for case in cases:
            inputs = encoded(model.processor, case.prompt)
            count = inputs["input_ids"].shape[1]
            cuts = [count // 2, count - 1] if gate.generation_prompt_ids else [count // 2]
            try:
                found = model.judge(inputs, cuts)
            except Exception as error:
                said = f"a later call fails: {' '.join(str(error).split())[:200]}"
                try:  # some decoders accept several tokens only in the first call
                    self.run(self.blocks()).prompt(inputs, cuts)
                except Exception:
                    return [Check(name, None, f"not checked, since the original fails likewise: {said}")]
                return [Check(name, False, said)]
            apart = max(apart, abs(found - case.unsafe_probability)) if np.isfinite(found) else np.inf
        most = ROUNDED["float32"] if self.exact else QUANTIZED
        detail = f"largest difference {apart:.1e} over {len(cases)} prompts, tolerance {most:g}"
        return [Check(name, apart <= most, detail)]

    # ------------------------------------------------------------------------------------- graphs with other outputs

    def lanes(self, settings: LaneSettings, *, alone: bool = False) -> Model:
        """Return the graphs with the features for probes as outputs, "projected" and "plain", (1, features). With
        `alone`, the outputs are only the normed ends of both lanes, (1, hidden)."""
        blocks = self.blocks()
        add = Builder(blocks.model.graph, "/sasa/features")
        assert settings.pair is not None
        safety, semantic = (add("Cast", blocks.states[index], to=ir.DataType.FLOAT) for index in settings.pair)
        axis, least, last = add.constant([-1]), add.constant(settings.epsilon, np.float32), add.constant(-1)
        along, square = (
            add("ReduceSum", add("Mul", state, semantic), axis, keepdims=1) for state in (safety, semantic)
        )
        projection = add("Mul", add("Div", along, add("Max", square, least)), semantic)  # (1, tokens, hidden)
        reach, far = add.constant([-settings.tokens]), add.constant([FAR])  # one row, without padding
        whole = {name: value for name, value in blocks.inputs.items() if name in ("attention_mask", "position_ids")}
        given = {name: add("Slice", value, reach, far, axis) for name, value in whole.items()}
        projection = add("Slice", projection, reach, far, add.constant([1]))  # (1, reached, hidden)
        end = add_lane(blocks, settings.pair[0], projection, given)
        ends = {"projected": add("Gather", end, last, axis=1), "plain": add("Gather", blocks.norm, last, axis=1)}
        if not alone and not self.linear:
            ends = {name: add_head(blocks, value, f"/sasa/{name}") for name, value in ends.items()}
        if not alone:
            judged = add("Concat", *(add("Gather", blocks.states[one], axis, axis=1) for one in settings.pair), axis=1)
            normed = add_lane(blocks, len(blocks.states) - 1, judged, prefix="/sasa/normed")  # (1, 2, hidden)
            parts = (ends["projected"], add("Reshape", normed, add.constant([1, -1])))
            ends["projected"] = add("Concat", *(add("Cast", part, to=ir.DataType.FLOAT) for part in parts), axis=-1)
        return self.run(blocks, ends)

    def behind_blocks(self) -> Model:
        """Return the graphs with the blocks' outputs at the last token as outputs: "states", and "normed" by the final
        norm, (1, blocks, hidden) each."""
        blocks = self.blocks()
        add = Builder(blocks.model.graph, "/sasa/behind")
        last = add.constant([-1])
        states = add("Concat", *(add("Gather", state, last, axis=1) for state in blocks.states), axis=1)
        normed = add_lane(blocks, len(blocks.states) - 1, states, prefix="/sasa/normed")  # the norm alone
        return self.run(blocks, {"states": states, "normed": normed})

    def head_weight(self) -> np.ndarray:
        """Return the head's weights, (vocabulary, hidden), float32, computed from unit vectors for any storage."""
        blocks, hidden = self.blocks(), self.sizes.hidden
        graph, head, add = blocks.model.graph, blocks.head, Builder(blocks.model.graph, "/sasa/units")
        kinds = [blocks.read.dtype, *(value.dtype for value in head.inputs if value is not None)]
        kind = next((kind for kind in kinds if kind is not None and kind.is_floating_point()), ir.DataType.FLOAT)
        rows = np.eye(hidden + 1, hidden, dtype=np.float32)  # the last row, 0, gives the bias
        rows = rows if head.op_type == "Gemm" else rows[None]
        units = ir.Value(name="units", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(rows.shape))
        made = clone(graph, head.outputs[0], {blocks.read: add("Cast", units, to=kind)}, "/sasa/units")
        graph.inputs.clear()
        graph.inputs.append(units)
        logits = self.run(blocks, {"head": made}).decoder.run(None, {"units": rows})[0].reshape(hidden + 1, -1)
        return (logits[:-1] - logits[-1]).T

    def _fill(
        self, results: Results, outputs: dict[str, str], settings: LaneSettings, report: Silent, *, alone: bool = False
    ) -> None:
        """Fill the results with outputs of `lanes`. `outputs` maps names of results to names of outputs."""
        lanes = self.lanes(settings, alone=alone)

        def compute(some: list[Prompt], missing: list[str]) -> Arrays:
            found = read(lanes, some, [outputs[name] for name in missing])
            return ((name, found[outputs[name]]) for name in missing)

        results.fill(list(outputs), compute, report)


def read(model: Model, prompts: Sequence[Prompt], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return outputs of graphs by name, (prompts, ...) each. The prompts run one after the other."""
    found: list[dict[str, Any]] = [model.prompt(encoded(model.processor, prompt)) for prompt in prompts]
    return {name: np.concatenate([values[name].numpy() for values in found]) for name in names}
