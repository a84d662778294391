"""The unpatched model, opened: one for transformers (here), or ONNX graphs that others exported (`foreign.original`).

Both have the same attributes and methods, so that whoever patches, locates or evaluates does not ask which it is.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from sasa_export.foreign.opened import holds_graphs
from sasa_export.graph.rewrite import LaneSettings, rewrite_lane
from sasa_export.graph.trace import trace_source
from sasa_export.layers.pairs import Pair
from sasa_export.layers.prompts import controls
from sasa_export.layers.survey import MAIN_LANE, Evidence, evidence_of, reading
from sasa_export.layers.sweep import second_lane
from sasa_export.manifest import write_manifest
from sasa_export.models import Source, open_source
from sasa_export.models.load import head_weight, load_processor, read_sizes, running, stock_classes
from sasa_export.models.quantized import check_scheme
from sasa_export.options import REACH, Options, check_for_graphs
from sasa_export.probe import bundled
from sasa_export.probe.calibration import Fitted, calibrate
from sasa_export.probe.features import Features, collect_on_disk, load_as_traced
from sasa_export.probe.work import Results, Work
from sasa_export.prompts import Prompt, for_model
from sasa_export.report import Check, Silent, all_passed
from sasa_export.runtime.settings import OPERATOR
from sasa_export.verify import check_written
from sasa_export.workers import workers
from sasa_export.writers.card import write_card
from sasa_export.writers.cases import Asked, ask
from sasa_export.writers.config import write_config
from sasa_export.writers.directory import Patch, write_beside
from sasa_export.writers.onnx.directory import check_possible, write_onnx_card, write_onnx_manifest
from sasa_export.writers.weights import write_weights

if TYPE_CHECKING:
    from sasa_export.foreign.original import GraphOriginal

Original: TypeAlias = "TorchOriginal | GraphOriginal"


def are_graphs(options: Any) -> bool:
    """Is the model of a command's options a directory of ONNX graphs that others exported?"""
    return bool(options.onnx_file) or holds_graphs(options.model)


def open_original(options: Any) -> Original:
    """Open and trace the model of a command's options; no weights are loaded. SasaExportError says what is wrong."""
    if are_graphs(options):
        from sasa_export.foreign.original import GraphOriginal  # a lean installation has no onnx

        check_for_graphs(options)
        return GraphOriginal(options.model, options.onnx_file)
    plain = getattr(options, "format", "safetensors") != "safetensors"
    source = open_source(options.model, options.revision, partial(check_scheme, plain=plain))
    if plain:
        check_possible(source, options)
    return TorchOriginal(source, options.dtype, options.device)


def running_as(original: Original) -> dict[str, str]:
    """How it runs, as reports and finished work name it: any one CUDA device is like the others."""
    return {"dtype": original.dtype, "device": original.device.partition(":")[0]}


class TorchOriginal:
    """A model for transformers.

    Attributes:
        graph: its main lane.
        dtype, device: what it runs in and on, once it is `loaded`, before which it is only opened.
        more: what config.json says of the gate besides.
        sees: it can be asked about pictures.
        model: the weights.
    """

    more: Mapping[str, Any] = {}
    sees = True
    model: Any = None

    def __init__(self, source: Source, dtype: str, device: str) -> None:
        self.source, self.sizes, self.processor = source, read_sizes(source), load_processor(source)
        self.graph = trace_source(source, self.processor)
        self.dtype, self.device = running(source, dtype, workers().device(device))

    def readable(self, prompts: Sequence[Prompt], report: Silent) -> list[Prompt]:
        """The prompts as the model is asked them."""
        return for_model(prompts, self.processor)

    def check_lane(self, settings: LaneSettings) -> str:
        """What is told of the lane, which is right as soon as the graph is."""
        return f"{len(self.graph.of('block'))} blocks as graphs/{self.source.family.name}.toml says"

    def shipped(self, settings: LaneSettings, options: Options) -> Fitted | None:
        """The probe that needs no calibration."""
        return bundled.read(self.source.name, settings, options.calibration, options.regularization)

    @contextmanager
    def loaded(self, prompts: Sequence[Prompt], report: Silent) -> Iterator[None]:
        """The weights are in memory while the context lasts, and the model runs as it was traced."""
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
        """Run the model on the prompts, with the second lane of each pair over so many `tokens`, and on the controls;
        then compute the figures.

        `regularization` is the C of the sweep's probes; None chooses it as calibration does. All processes run the
        model, and all but the first return None.
        """
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
        self, settings: LaneSettings, prompts: Sequence[Prompt], work: Work, report: Silent, **more: Any
    ) -> Features:
        """What probes read, by `collect_on_disk`."""
        lane = rewrite_lane(self.graph, settings)
        return collect_on_disk(self.model, self.processor, lane, prompts, work, report, **more)

    def fit(
        self, settings: LaneSettings, features: Features, prompts: Sequence[Prompt], regularization: float | None
    ) -> Fitted:
        """Probes on what `features` gave."""
        return calibrate(self.model, rewrite_lane(self.graph, settings), features, prompts, regularization)

    def asking(self, settings: LaneSettings) -> Callable[[Prompt], Asked]:
        """What `writers.cases.expect` asks."""
        return partial(ask, self.model, self.processor, rewrite_lane(self.graph, settings))

    def write(self, patch: Patch, staging: Path, options: Options, report: Silent) -> None:
        """Write and verify the formats that are asked for."""
        plain = staging if options.format == "safetensors" else staging / "safetensors"
        plain.mkdir(exist_ok=True)
        _write_safetensors(patch, plain, options, report)
        if options.format != "safetensors":
            graphs = staging if options.format == "onnx" else staging / "onnx"
            graphs.mkdir(exist_ok=True)
            _write_onnx(patch, plain, graphs, options, report)


def _write_safetensors(patch: Patch, directory: Path, options: Options, report: Silent) -> None:
    """Write the directory for transformers, and verify it unless graphs alone are wanted, which are made from it."""
    passing = options.format == "onnx"
    with report.bar(patch.source.weight_bytes(), "write") as advance:
        link = options.link or passing
        digests = write_weights(patch.source.shards, patch.probe, directory, link=link, advance=advance)
    write_beside(patch, directory)
    write_config(patch.source, patch.sasa, stock_classes(patch.source), directory)
    if passing:
        return
    checks = check_written(directory, device=patch.device, only_files=not patch.cases)
    all_passed(checks, report)
    write_card(patch, checks, options.verify, directory)
    operator = {name: patch.sasa[name] for name in OPERATOR}  # who may edit these
    write_manifest(
        directory, digests, options=options.to_json(), commit=patch.source.commit,
        layers_from=patch.sasa["layers_from"], operator=operator,
    )  # fmt: skip


def _write_onnx(patch: Patch, plain: Path, directory: Path, options: Options, report: Silent) -> None:
    """Write the ONNX directory from the one for transformers, which goes where nobody asked for it, and verify it."""
    from sasa_export.writers.onnx.graphs import write_onnx_directory

    write_onnx_directory(
        plain, directory, opset=options.opset, dtype=options.onnx_dtype, advance=lambda step: report.step("onnx", step)
    )
    if options.format == "onnx":
        shutil.rmtree(plain)
    if patch.cases and patch.calibration is not None:
        report.step("verify", "the graphs judge calibration prompts again")
    checks = check_written(directory, device=patch.device, only_files=not patch.cases, calibration=patch.calibration)
    if patch.cases and patch.calibration is None:
        said = "not checked, since the probe was given (--probe), so there are no calibration prompts"
        checks.append(Check("verdicts hold over the calibration prompts", None, said))
    all_passed(checks, report)
    write_onnx_card(patch, checks, options, directory)
    write_onnx_manifest(
        directory, {}, options=options.to_json(), commit=patch.source.commit, layers_from=patch.sasa["layers_from"]
    )
