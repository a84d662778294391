"""A model before it is patched, opened: what `locate` looks into, and what `evaluate` compares with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sasa_export.graph import LayerGraph
from sasa_export.graph.trace import trace_source
from sasa_export.models import Source
from sasa_export.models.load import Sizes, load_processor, read_sizes, running
from sasa_export.options import check_for_graphs
from sasa_export.prompts import Prompt, for_model
from sasa_export.report import Silent
from sasa_export.research.options import EvaluateOptions, LocateOptions
from sasa_export.workers import workers

if TYPE_CHECKING:
    from sasa_export.foreign.decoder import Decoder


@dataclass(frozen=True)
class Original:
    """The model and how it runs; no weights are loaded yet. `graph` is its main lane, and `decoder` that of ONNX graphs
    that others exported."""

    source: Source
    decoder: Decoder | None
    sizes: Sizes
    processor: Any
    graph: LayerGraph
    dtype: str
    device: str

    @property
    def running(self) -> dict[str, str]:
        """How it runs, as reports and finished work name it: any one CUDA device is like the others."""
        return {"dtype": self.dtype, "device": self.device.partition(":")[0]}

    def readable(self, prompts: list[Prompt], report: Silent) -> list[Prompt]:
        """The prompts that it can be asked, as it is asked them."""
        return for_model(prompts if self.decoder is None else self.decoder.readable(prompts, report), self.processor)


def open_exported(model: str, files: Sequence[str], options: LocateOptions | EvaluateOptions) -> Decoder:
    """The decoder of a directory of graphs. SasaExportError where it cannot be read, or an option is not for graphs."""
    from sasa_export.foreign.decoder import open_decoder
    from sasa_export.foreign.opened import open_graphs

    check_for_graphs(options)
    return open_decoder(open_graphs(model, tuple(files)))


def open_original(source: Source, decoder: Decoder | None, options: LocateOptions | EvaluateOptions) -> Original:
    """Read all but the weights, and trace the decoder, where it is none of graphs."""
    if decoder is not None:
        return Original(source, decoder, decoder.sizes, decoder.processor, decoder.main, decoder.dtype, "cpu")
    sizes, processor = read_sizes(source), load_processor(source)
    dtype, device = running(source, options.dtype, workers().device(options.device))
    return Original(source, None, sizes, processor, trace_source(source, processor), dtype, device)
