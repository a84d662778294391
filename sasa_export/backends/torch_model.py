"""A model for transformers, with its weights in torch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sasa_export.gate import GateSpec
from sasa_export.graph.rewrite import LaneSettings, rewrite_lane
from sasa_export.graph.trace import trace_source
from sasa_export.layers.pairs import Pair
from sasa_export.layers.prompts import controls
from sasa_export.layers.survey import MAIN_LANE, Evidence, evidence_of, reading
from sasa_export.layers.sweep import second_lane
from sasa_export.models import Source
from sasa_export.models.load import head_weight, load_processor, place, read_sizes, running
from sasa_export.options import REACH, Options
from sasa_export.probe.calibration import Fitted, calibrate
from sasa_export.probe.features import Features, collect, collect_on_disk, load_as_traced
from sasa_export.probe.work import Results, Work
from sasa_export.prompts import Prompt, for_model
from sasa_export.prompts.prompt import encode
from sasa_export.report import Check, Silent
from sasa_export.workers import workers
from sasa_export.writers.cases import TOKENS, Asked
from sasa_export.writers.config import write_config
from sasa_export.writers.directory import Patch, Written, write_beside
from sasa_export.writers.weights import write_weights


class TorchModel:
    """A stock or a patched model in torch, as `backends.Answering` describes it."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        ends = model.generation_config.eos_token_id
        self.ends = ends if isinstance(ends, list) else [ends]

    def answers(self, prompts: Sequence[Prompt], longest: int) -> dict[str, np.ndarray]:
        inputs = place(encode(self.processor, prompts), self.model)
        with torch.no_grad():
            said = self.model.generate(
                **inputs, max_new_tokens=longest, do_sample=False, num_beams=1, return_dict_in_generate=True
            )
        found = said["sequences"][:, inputs["input_ids"].shape[1] :].cpu().numpy()  # (batch, tokens)
        ends = np.isin(found, [end for end in self.ends if end is not None])  # (batch, tokens)
        tokens = np.full((len(prompts), longest), -1)
        tokens[:, : found.shape[1]] = np.where(ends.cumsum(1) > ends, -1, found)
        scores = said.get("unsafe_probability", torch.full((len(prompts),), torch.nan))  # (batch,)
        return {"tokens": tokens, "scores": scores.double().cpu().numpy()}

    def judge(self, prompts: Sequence[Prompt]) -> np.ndarray:
        return self.model.judge(**place(encode(self.processor, prompts), self.model)).float().cpu().numpy()


class TorchOriginal:
    """A model for transformers, with what `backends.Original` asks for. `model` has the weights, and is None outside
    `loaded`."""

    more: Mapping[str, Any] = {}
    sees = True
    model: Any = None

    def __init__(self, source: Source, dtype: str, device: str) -> None:
        self.source, self.sizes, self.processor = source, read_sizes(source), load_processor(source)
        self.graph = trace_source(source, self.processor)
        self.dtype, self.device = running(source, dtype, workers().device(device))

    def explained(self) -> AbstractContextManager[None]:
        return nullcontext()

    def readable(self, prompts: Sequence[Prompt], report: Silent) -> list[Prompt]:
        return for_model(prompts, self.processor, report)

    def check_lane(self, settings: LaneSettings) -> str:
        # A torch lane needs no self-test.
        return f"{len(self.graph.of('block'))} blocks as graphs/{self.source.family.name}.toml says"

    @contextmanager
    def loaded(self, prompts: Sequence[Prompt], report: Silent) -> Iterator[None]:
        report.step("load", f"{self.dtype} on {self.device}")
        self.model = load_as_traced(
            self.source, self.processor, self.graph, prompts, dtype=self.dtype, device=self.device
        )
        yield
        self.model = None

    def survey(
        self, prompts: Sequence[Prompt], pairs: Sequence[Pair], work: Work, report: Silent,
        *, batch_size: int, tokens: int = REACH, regularization: float | None = None,
    ) -> Evidence | None:  # fmt: skip
        results = Results(work, "prompts", prompts, batch_size)
        on_controls = Results(work, "controls", controls(prompts), batch_size)
        settings = {pair: LaneSettings(*pair, softcap=self.sizes.softcap, tokens=tokens) for pair in pairs}
        lanes = {second_lane(pair): rewrite_lane(self.graph, lane) for pair, lane in settings.items()}
        with reading(self.model, self.processor, self.graph, lanes) as read:
            results.fill([*lanes, *MAIN_LANE], read, report)
            on_controls.fill(MAIN_LANE, read, report)
        if not workers().leads:
            return None
        return evidence_of(results, on_controls, pairs, head_weight(self.model), self.processor, regularization, report)

    def features(
        self, settings: LaneSettings, prompts: Sequence[Prompt], work: Work, report: Silent,
        *, batch_size: int, kind: str = "calibrate",
    ) -> Features:  # fmt: skip
        lane = rewrite_lane(self.graph, settings)
        return collect_on_disk(
            self.model, self.processor, lane, prompts, work, report, batch_size=batch_size, kind=kind
        )

    def fit(
        self, settings: LaneSettings, features: Features, prompts: Sequence[Prompt], regularization: float | None
    ) -> Fitted:
        return calibrate(self.model, rewrite_lane(self.graph, settings), features, prompts, regularization)

    def asking(self, settings: LaneSettings) -> Callable[[Prompt], Asked]:
        model, processor, lane = self.model, self.processor, rewrite_lane(self.graph, settings)

        def ask(prompt: Prompt) -> Asked:
            state = collect(model, processor, lane, [prompt], batch_size=1).projected
            inputs = place(encode(processor, [prompt]), model)
            with torch.no_grad():
                answer = model.generate(
                    **inputs, max_new_tokens=TOKENS, do_sample=False, num_beams=1,
                    return_dict_in_generate=True, output_logits=True,
                )  # fmt: skip
            tokens = answer.sequences[0, inputs["input_ids"].shape[1] :].tolist()
            ids = [] if prompt.image is not None else inputs["input_ids"][0].tolist()
            return state, answer.logits[0][0].float().cpu().numpy(), tokens, ids

        return ask

    def answering(self) -> TorchModel:
        return TorchModel(self.model, self.processor)

    def unchanged(self, gate: GateSpec) -> list[Path]:
        return [] if gate.graphs else [shard.path for shard in self.source.shards]

    def more_checks(self, written: Written) -> list[Check]:
        return []

    def write(self, patch: Patch, staging: Path, options: Options, report: Silent) -> Iterator[Written]:
        for form in ("safetensors", "onnx"):
            if options.format in (form, "both"):
                directory = staging / form if options.format == "both" else staging
                directory.mkdir(exist_ok=True)
                if form == "safetensors":
                    yield Written(patch, directory, _write_safetensors(patch, directory, options, report))
                else:
                    from sasa_export.onnx.export import export  # a lean installation lacks onnx

                    made = export(patch, directory, opset=options.opset, dtype=options.onnx_dtype, report=report)
                    yield Written(made, directory, {})


def _write_safetensors(patch: Patch, directory: Path, options: Options, report: Silent) -> dict[str, str | None]:
    """Write the directory for transformers. Return the digests of its shards."""
    with report.bar(patch.source.weight_bytes(), "write") as advance:
        digests = write_weights(patch.source.shards, patch.probe, directory, link=options.link, advance=advance)
    write_beside(patch, directory)
    write_config(patch.source, patch.gate, directory)
    return digests
