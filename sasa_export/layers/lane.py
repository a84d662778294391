"""The main lane with every block watched: what goes in and comes out, and how to run a part of it again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sasa_export.graph import LayerGraph
from sasa_export.models.load import place
from sasa_export.probe.features import last_real, watching
from sasa_export.prompts.prompt import Prompt, encode
from sasa_export.runtime.lane import Recording, current_recording, run_lane, start, within


@dataclass(frozen=True)
class Batch:
    """A batch of prompts that the main lane ran on. `judged` (rows,) is the position of each row's last token."""

    seen: Recording
    judged: torch.Tensor

    def last(self, state: torch.Tensor) -> torch.Tensor:
        """(rows, tokens, hidden) -> (rows, hidden), at the last token."""
        rows = torch.arange(state.shape[0], device=state.device)
        return state[rows, self.judged.to(state.device)]


class MainLane:
    """A model whose blocks are watched. Make it with `watched`, which also sees to it that no gradients are kept."""

    def __init__(self, model: Any, processor: Any, graph: LayerGraph) -> None:
        self.model, self.processor, self.graph = model, processor, graph
        self.blocks = tuple(str(node.module) for node in graph.of("block"))  # module paths
        self.norm = model.get_submodule(graph["norm"].module)
        self.head = model.get_submodule(graph["head"].module)

    def run(self, prompts: Sequence[Prompt]) -> Batch:
        """Run the decoder once over a batch of prompts."""
        inputs = place(encode(self.processor, prompts), self.model)
        with within(current_recording, Recording()) as seen:
            self.model(**inputs, use_cache=False, logits_to_keep=1)
        return Batch(seen, last_real(inputs))

    def states(self, batch: Batch) -> list[torch.Tensor]:
        """The last token's state behind each block, (rows, hidden) each."""
        return [batch.last(batch.seen.outputs[path]) for path in self.blocks]

    def second(self, batch: Batch, lane: LayerGraph) -> torch.Tensor:
        """The second lane of a rewritten graph on the batch: its normed state at the last token, (rows, hidden)."""
        nodes = [node.to_json() for node in lane if node.op != "lane_head"]
        name, states = start(nodes, batch.seen)  # (rows, tokens, hidden)
        return run_lane(self.model, nodes, {name: states}, batch.seen.arguments, batch.judged)["sasa.lane.norm"]

    def normed(self, state: torch.Tensor) -> torch.Tensor:
        """The final norm on states (rows, hidden)."""
        return self.norm(state.unsqueeze(1)).squeeze(1)


@contextmanager
def watched(model: Any, processor: Any, graph: LayerGraph) -> Iterator[MainLane]:
    """Watch every block of the model's decoder while the context lasts, without gradients."""
    lane = MainLane(model, processor, graph)
    with (
        torch.no_grad(),
        watching(model, [{"op": op, "module": path} for path in lane.blocks for op in ("block", "tap")]),
    ):
        yield lane
