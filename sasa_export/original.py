"""The unpatched model, opened: a model for transformers (here), or graphs that others exported (`graph_original`).

Both have the same attributes and methods, so that the commands patch, locate and evaluate treat them alike.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

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
from sasa_export.onnx.directory import check_possible, write_onnx_card, write_onnx_manifest
from sasa_export.onnx.opened import holds_graphs
from sasa_export.options import REACH, Options, check_for_graphs
from sasa_export.probe import bundled
from sasa_export.probe.calibration import Fitted, calibrate
from sasa_export.probe.features import Features, collect_on_disk, load_as_traced
from sasa_export.probe.work import Results, Work
from sasa_export.prompts import Prompt, for_model
from sasa_export.report import Check, Silent, all_passed
from sasa_export.verify import check_written
from sasa_export.workers import workers
from sasa_export.writers.card import write_card
from sasa_export.writers.cases import Asked, ask
from sasa_export.writers.config import write_config
from sasa_export.writers.directory import Patch, write_beside
from sasa_export.writers.weights import write_weights

if TYPE_CHECKING:
    from sasa_export.graph_original import GraphOriginal

Original: TypeAlias = "TorchOriginal | GraphOriginal"


def are_graphs(options: Any) -> bool:
    """Return whether the model of a command's options is a directory of ONNX graphs that others exported."""
    return bool(options.onnx_file) or holds_graphs(options.model)


def open_original(options: Any) -> Original:
    """Open and trace the model of a command's options, without loading weights. Raise SasaExportError on failure."""
    if are_graphs(options):
        from sasa_export.graph_original import GraphOriginal  # a lean installation lacks onnx

        check_for_graphs(options)
        return GraphOriginal(options.model, options.onnx_file)
    plain = getattr(options, "format", "safetensors") != "safetensors"
    source = open_source(options.model, options.revision, partial(check_scheme, plain=plain))
    if plain:
        check_possible(source, options)
    return TorchOriginal(source, options.dtype, options.device)


def running_as(original: Original) -> dict[str, str]:
    """Return dtype and device as reports and finished work name them. All CUDA devices have the same name."""
    return {"dtype": original.dtype, "device": original.device.partition(":")[0]}


class TorchOriginal:
    """A model for transformers.

    Attributes:
        graph: the main lane.
        dtype, device: the type and the device in which `loaded` loads the weights.
        more: further settings of the gate for config.json.
        sees: whether prompts may have pictures.
        model: the model with its weights, None outside `loaded`.
    """

    more: Mapping[str, Any] = {}
    sees = True
    model: Any = None

    def __init__(self, source: Source, dtype: str, device: str) -> None:
        self.source, self.sizes, self.processor = source, read_sizes(source), load_processor(source)
        self.graph = trace_source(source, self.processor)
        self.dtype, self.device = running(source, dtype, workers().device(device))

    def readable(self, prompts: Sequence[Prompt], report: Silent) -> list[Prompt]:
        """Return the prompts that the model can read, in the form in which it reads them."""
        return for_model(prompts, self.processor, report)

    def check_lane(self, settings: LaneSettings) -> str:
        """Return the status line of the lane. A torch lane needs no self-test."""
        return f"{len(self.graph.of('block'))} blocks as graphs/{self.source.family.name}.toml says"

    def shipped(self, settings: LaneSettings, options: Options) -> Fitted | None:
        """Return the bundled probe, which needs no calibration, or None."""
        return bundled.read(self.source.name, settings, options.calibration, options.regularization)

    @contextmanager
    def loaded(self, prompts: Sequence[Prompt], report: Silent) -> Iterator[None]:
        """Keep the weights in memory during the context, and check that the model runs as it was traced."""
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
        """Run the model on the prompts, with each pair's second lane over `tokens` tokens, and on the controls. Then
        compute the figures.

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
        """Return the features that probes read, from `collect_on_disk`."""
        lane = rewrite_lane(self.graph, settings)
        return collect_on_disk(self.model, self.processor, lane, prompts, work, report, **more)

    def fit(
        self, settings: LaneSettings, features: Features, prompts: Sequence[Prompt], regularization: float | None
    ) -> Fitted:
        """Return probes that are fitted to the features."""
        return calibrate(self.model, rewrite_lane(self.graph, settings), features, prompts, regularization)

    def asking(self, settings: LaneSettings) -> Callable[[Prompt], Asked]:
        """Return the function with which `writers.cases.expect` asks the model."""
        return partial(ask, self.model, self.processor, rewrite_lane(self.graph, settings))

    def write(self, patch: Patch, staging: Path, options: Options, report: Silent) -> None:
        """Write and verify the formats in the options."""
        for form, write in (("safetensors", _write_safetensors), ("onnx", _write_onnx)):
            if options.format in (form, "both"):
                directory = staging / form if options.format == "both" else staging
                directory.mkdir(exist_ok=True)
                write(patch, directory, options, report)


def _write_safetensors(patch: Patch, directory: Path, options: Options, report: Silent) -> None:
    """Write the directory for transformers, and verify it."""
    with report.bar(patch.source.weight_bytes(), "write") as advance:
        digests = write_weights(patch.source.shards, patch.probe, directory, link=options.link, advance=advance)
    write_beside(patch, directory)
    write_config(patch.source, patch.gate, stock_classes(patch.source), directory)
    checks = check_written(directory, device=patch.device, only_files=not patch.cases)
    all_passed(checks, report)
    write_card(patch, checks, options.verify, directory)
    write_manifest(
        directory, digests, options=options.to_json(), commit=patch.source.commit,
        layers_from=patch.gate.layers_from, operator=patch.gate.operator,
    )  # fmt: skip


def _write_onnx(patch: Patch, directory: Path, options: Options, report: Silent) -> None:
    """Write the ONNX directory, and verify it."""
    from sasa_export.onnx.export import export

    patch = export(patch, directory, opset=options.opset, dtype=options.onnx_dtype, report=report)
    if patch.cases and patch.calibration is not None:
        report.step("verify", "the graphs judge calibration prompts again")
    checks = check_written(directory, device=patch.device, only_files=not patch.cases, calibration=patch.calibration)
    if patch.cases and patch.calibration is None:
        said = "not checked, since the probe was given (--probe), so there are no calibration prompts"
        checks.append(Check("verdicts hold over the calibration prompts", None, said))
    all_passed(checks, report)
    write_onnx_card(patch, checks, options, directory)
    write_onnx_manifest(
        directory, {}, options=options.to_json(), commit=patch.source.commit, layers_from=patch.gate.layers_from
    )
