"""The survey of `layers.survey`, of graphs: each pair's second lane, and the main lane behind each block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch

from sasa_export.foreign.decoder import Decoder, load_blocks
from sasa_export.foreign.features import head_weight, lanes, read, run
from sasa_export.foreign.lane import Builder, add_lane
from sasa_export.graph.rewrite import LaneSettings
from sasa_export.layers.pairs import Pair
from sasa_export.layers.prompts import controls
from sasa_export.layers.survey import LIKELIEST, MAIN_LANE, Evidence, evidence_of
from sasa_export.layers.sweep import second_lane
from sasa_export.probe.work import Results, Work
from sasa_export.prompts.prompt import Prompt
from sasa_export.report import Silent
from sasa_export.verify.fresh.onnx_model import Model
from sasa_export.workers import workers

Arrays = Iterator[tuple[str, np.ndarray]]


def survey_graphs(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    pairs: Sequence[Pair],
    work: Work,
    report: Silent,
    *,
    batch_size: int,
    regularization: float | None = None,
) -> Evidence | None:
    """As `layers.survey.survey`, one pair after the other, since the graph of each takes memory of its own."""
    results = Results(work, "prompts", prompts, batch_size)
    on_controls = Results(work, "controls", controls(prompts), batch_size)
    for number, pair in enumerate(pairs):
        report.step("", f"second lane {number + 1} of {len(pairs)}: safety layer {pair[0]}, semantic layer {pair[1]}")
        reading = partial(_second, lanes(decoder, LaneSettings(*pair), logits=False))
        results.fill([second_lane(pair)], reading, report)
        del reading  # before there is another in memory
    main, head = behind_blocks(decoder), head_weight(decoder)  # (vocabulary, hidden)

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
    return evidence_of(results, on_controls, pairs, head, decoder.processor, regularization, report)


def _second(reading: Model, some: list[Prompt], missing: list[str]) -> Arrays:
    yield missing[0], read(reading, some, ["projected"])["projected"]


def behind_blocks(decoder: Decoder) -> Model:
    """The graphs with what is behind each block at the last token, as it is and behind the final norm: "states" and
    "normed", (1, blocks, hidden) each."""
    blocks = load_blocks(decoder.graphs)
    add = Builder(blocks.model.graph, "/sasa/behind")
    last = add.constant([-1])
    states = add("Concat", *(add("Gather", state, last, axis=1) for state in blocks.states), axis=1)
    normed = add_lane(blocks, len(blocks.states) - 1, states, None, "/sasa/normed")  # no block is behind the last
    return run(decoder, blocks, {"states": states, "normed": normed})
