"""The unpatched model, opened: the one interface through which patch, locate and evaluate read a model and write it.

`torch_model` fulfils it for models of transformers, and `onnx_graphs` for ONNX graphs that others exported. Only this
module decides which of the two a model needs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sasa_export.backends.torch_model import TorchOriginal
from sasa_export.gate import GateSpec
from sasa_export.graph import LayerGraph
from sasa_export.graph.rewrite import LaneSettings
from sasa_export.layers.pairs import Pair
from sasa_export.layers.survey import Evidence
from sasa_export.models import Source, open_source
from sasa_export.models.load import Sizes
from sasa_export.models.quantized import check_scheme
from sasa_export.onnx.directory import check_possible
from sasa_export.onnx.opened import holds_graphs
from sasa_export.options import Options, check_for_graphs
from sasa_export.probe.calibration import Fitted
from sasa_export.probe.features import Features
from sasa_export.probe.work import Work
from sasa_export.prompts.prompt import Prompt
from sasa_export.report import Check, Silent
from sasa_export.writers.cases import Asked
from sasa_export.writers.directory import Patch, Written


class Answering(Protocol):
    """A model with its weights, unpatched or patched, that answers prompts."""

    processor: Any

    def answers(self, prompts: Sequence[Prompt], longest: int) -> dict[str, np.ndarray]:
        """Return greedy `tokens` (prompts, longest), with the end token and -1 after it; and `scores` (prompts,),
        P(unsafe), NaN without a verdict."""

    def judge(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Return P(unsafe), (prompts,)."""


class Original(Protocol):
    """An unpatched model, opened and traced. Its weights are in memory within `loaded` alone.

    Attributes:
        source, sizes, processor: its files, the decoder's sizes, and the processor that writes its prompts.
        graph: the main lane.
        dtype, device: the type and the device in which it runs.
        more: further settings of the gate for config.json.
        sees: whether prompts may have pictures.
    """

    source: Source
    sizes: Sizes
    processor: Any
    graph: LayerGraph
    dtype: str
    device: str
    more: Mapping[str, Any]
    sees: bool

    def explained(self) -> AbstractContextManager[None]:
        """Return the context in which errors that other libraries may raise on this model become SasaExportError."""

    def readable(self, prompts: Sequence[Prompt], report: Silent) -> list[Prompt]:
        """Return the prompts that the model can read, in the form in which it reads them."""

    def check_lane(self, settings: LaneSettings) -> str:
        """Return the status line of the second lane. Raise TraceError where a self-test shows that it is wrong."""

    def loaded(self, prompts: Sequence[Prompt], report: Silent) -> AbstractContextManager[None]:
        """Keep the weights in memory during the context, and check that the model runs as it was traced. `survey`,
        `features`, `fit`, `asking` and `answering` need it."""

    def survey(
        self, prompts: Sequence[Prompt], pairs: Sequence[Pair], work: Work, report: Silent,
        *, batch_size: int, tokens: int, regularization: float | None = None,
    ) -> Evidence | None:  # fmt: skip
        """Run the model on the prompts, with each pair's second lane over `tokens` tokens, and on the controls. Then
        compute the figures.

        `regularization` is the C of the sweep's probes; None chooses it as calibration does. All processes run the
        model, and all but the first return None.
        """

    def features(
        self, settings: LaneSettings, prompts: Sequence[Prompt], work: Work, report: Silent,
        *, batch_size: int, kind: str = "calibrate",
    ) -> Features:  # fmt: skip
        """Return the features that probes read, (prompts, features), and store them in `work` under `kind`."""

    def fit(
        self, settings: LaneSettings, features: Features, prompts: Sequence[Prompt], regularization: float | None
    ) -> Fitted:
        """Return probes that are fitted to the features."""

    def asking(self, settings: LaneSettings) -> Callable[[Prompt], Asked]:
        """Return the function with which `writers.cases.expect` asks the model."""

    def answering(self) -> Answering:
        """Return the model as one that answers prompts."""

    def unchanged(self, gate: GateSpec) -> list[Path]:
        """Return the files of weights that a directory with this gate, made from this model, holds byte for byte."""

    def write(self, patch: Patch, staging: Path, options: Options, report: Silent) -> Iterator[Written]:
        """Write each format in the options, without card and manifest, which need the verification's results. Each
        directory is verified before the next is written."""

    def more_checks(self, written: Written) -> list[Check]:
        """Return the checks of a written directory that need the unpatched model."""


def open_original(
    options: Any, model: str | None = None, revision: str | None = None, files: Sequence[str] = ()
) -> Original:
    """Open and trace a model, without loading weights. Raise SasaExportError on failure.

    Args:
        options: the options of a command.
        model, revision: what replaces those of the options.
        files: the graphs that are meant where a directory of graphs has several variants. Default: `onnx_file`.
    """
    model, chosen = model or options.model, getattr(options, "onnx_file", ())
    if chosen or holds_graphs(model):
        from sasa_export.backends.onnx_graphs import GraphOriginal  # a lean installation lacks onnx

        check_for_graphs(options)
        return GraphOriginal(model, files or chosen)
    plain = getattr(options, "format", "safetensors") != "safetensors"
    revision = revision or getattr(options, "revision", None)
    source = open_source(model, revision, partial(check_scheme, plain=plain))
    if plain:
        check_possible(source, options)
    return TorchOriginal(source, options.dtype, options.device)


def running_as(original: Original) -> dict[str, str]:
    """Return dtype and device as reports and finished work name them. All CUDA devices have the same name."""
    return {"dtype": original.dtype, "device": original.device.partition(":")[0]}
