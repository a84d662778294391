"""Collect the evidence for choosing layers: record a model's states behind its blocks, and compute figures from them.

`locate` and patches with `auto` layers use it. Hidden states of all tokens stay in memory for one batch only. Kept are
the last token's state and five likeliest tokens behind every block, and one state of each second lane.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sasa_export.graph import LayerGraph
from sasa_export.layers.capabilities import Expression, expression, separability, token_texts, understanding
from sasa_export.layers.pairs import Pair
from sasa_export.layers.sweep import Sweep, sweep
from sasa_export.models.load import place
from sasa_export.probe.features import end_of_lane, last_real, watching
from sasa_export.probe.fit import head_metric
from sasa_export.probe.intervals import Comparable
from sasa_export.probe.work import Results
from sasa_export.prompts.prompt import Prompt, encode
from sasa_export.report import Silent
from sasa_export.runtime.lane import Recording, at_judged, current_recording, within

LIKELIEST = 5  # tokens per state in the logit lens
MAIN_LANE = ("tokens", "plain", "states")  # names of the main lane's arrays in `reading`

Arrays = Iterator[tuple[str, np.ndarray]]


@dataclass(frozen=True)
class Evidence:
    """The three capabilities block by block, and the sweep.

    Attributes:
        perception: AUC behind each block, for "all" prompts and for each channel.
        understanding: alignment behind each block with the "text_only" and "image_dominant" controls, or None.
    """

    perception: dict[str, list[Comparable]]
    understanding: dict[str, list[Comparable]] | None
    expression: Expression
    sweep: Sweep


@contextmanager
def reading(
    model: Any, processor: Any, graph: LayerGraph, lanes: Mapping[str, LayerGraph]
) -> Iterator[Callable[[list[Prompt], Collection[str]], Arrays]]:
    """Watch every block within the context. The value is a function that runs a batch and yields named arrays.

    All arrays are of the last token. Each name in `lanes` (rewritten graphs) gives the normed state of its second
    lane, (rows, hidden). "tokens" are the likeliest tokens behind each block, (rows, blocks, 5). "states" are the
    states there, (rows, blocks, hidden). "plain" is the normed final state, (rows, hidden).
    """
    blocks = [str(node.module) for node in graph.of("block")]
    norm, head = (model.get_submodule(graph[name].module) for name in ("norm", "head"))

    def read(prompts: list[Prompt], names: Collection[str]) -> Arrays:
        inputs = place(encode(processor, prompts), model)
        with within(current_recording, Recording()) as seen:
            model(**inputs, use_cache=False, logits_to_keep=1)
        at = last_real(inputs)  # (rows,)
        for name in [name for name in names if name in lanes]:
            nodes = [node.to_json() for node in lanes[name] if node.op not in ("lane_head", "state_norm", "join")]
            yield name, end_of_lane(model, nodes, seen, inputs).float().cpu().numpy()  # (rows, hidden)
        if not set(MAIN_LANE) & set(names):
            return
        states = at_judged({path: seen.outputs[path] for path in blocks}, at).values()  # (rows, 1, hidden) each
        normed = [norm(state).squeeze(1) for state in states]  # (rows, hidden) each
        tokens = [head(state).topk(LIKELIEST).indices.cpu() for state in normed]  # (rows, 5) each
        yield "tokens", torch.stack(tokens, 1).numpy().astype(np.int32)
        yield "plain", normed[-1].float().cpu().numpy()
        yield "states", torch.cat([state.float().cpu() for state in states], 1).numpy()

    with torch.no_grad(), watching(model, [{"op": op, "module": path} for path in blocks for op in ("block", "tap")]):
        yield read


def evidence_of(
    results: Results,
    on_controls: Results,
    pairs: Sequence[Pair],
    head: np.ndarray,
    processor: Any,
    regularization: float | None,
    report: Silent,
) -> Evidence:
    """Return the evidence, computed from the stored results of the model's runs. head: (vocabulary, hidden)."""
    tokens = results.read("tokens")  # (prompts, blocks, 5)
    perception = separability(results, tokens.shape[1], report)
    swept = sweep(results, pairs, head_metric(head), regularization, report)
    expressed = expression(tokens, token_texts(processor.tokenizer, len(head)))
    return Evidence(perception, understanding(on_controls, tokens.shape[1]), expressed, swept)
