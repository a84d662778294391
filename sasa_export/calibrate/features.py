"""What the probe reads: the state of both lanes at the last prompt position, for every prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sasa_export.calibrate.data import Prompt
from sasa_export.errors import CalibrationError
from sasa_export.graph import LayerGraph


@dataclass(frozen=True)
class Features:
    """The second lane's and the main lane's first-token features: (prompts, features), float32.

    They are normed hidden states, or logits where the graph has a head in the lane.
    """

    projected: np.ndarray
    plain: np.ndarray


def encode(processor: Any, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """One padded batch of model inputs."""
    return dict(
        processor.apply_chat_template(
            [prompt.conversation() for prompt in prompts],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"padding": True, "return_tensors": "pt"},
        )
    )


def collect(
    model: Any,
    processor: Any,
    graph: LayerGraph,
    prompts: Sequence[Prompt],
    *,
    batch_size: int,
    advance: Callable[[int], None] = lambda count: None,
) -> Features:
    """Run both lanes over all prompts.

    Args:
        graph: the rewritten lane (`rewrite_lane`), executed by the code that the patched model carries.
        advance: called with the number of prompts done since the last call.

    Raises CalibrationError where a state is not finite.
    """
    import torch

    from sasa_export.runtime.modeling_sasa import last_real, recording, run_graph, watch

    nodes = graph.to_json()
    heads = graph.of("lane_head")
    projected: list[Any] = [None] * len(prompts)
    plain: list[Any] = [None] * len(prompts)
    norm = model.get_submodule(graph["norm"].module)
    handles = watch(model, nodes)
    seen_norm: list[torch.Tensor] = []
    handles.append(norm.register_forward_hook(lambda module, args, output: seen_norm.append(output)))
    try:
        for rows in batches(prompts, batch_size):
            inputs = place(encode(processor, [prompts[row] for row in rows]), model)
            seen_norm.clear()
            with torch.no_grad(), recording() as seen:
                output = model(**inputs, use_cache=False, logits_to_keep=1)
                tokens = inputs["input_ids"].shape[1]
                judged = last_real(inputs.get("attention_mask"), tokens, inputs["input_ids"])  # (batch,)
                main = seen_norm[0]  # (batch, tokens, hidden)
            with torch.no_grad():
                values = run_graph(model, nodes, seen, judged)
            lane = values["sasa.lane.head" if heads else "sasa.lane.norm"]  # (batch, features)
            index = torch.arange(len(rows), device=main.device)
            main = output.logits[:, -1] if heads else main[index, judged.to(main.device)]  # (batch, features)
            for row, first, second in zip(rows, main.float().cpu(), lane.float().cpu(), strict=True):
                plain[row], projected[row] = first.numpy(), second.numpy()
            advance(len(rows))
    finally:
        for handle in handles:
            handle.remove()
    features = Features(np.stack(projected), np.stack(plain))
    for row, prompt in enumerate(prompts):
        if not (np.isfinite(features.projected[row]).all() and np.isfinite(features.plain[row]).all()):
            raise CalibrationError(
                f"the model's state for the calibration prompt {prompt.name} is not finite. "
                "Its weights may be damaged, or --dtype too narrow: try --dtype float32."
            )
    return features


def place(inputs: dict[str, Any], model: Any) -> dict[str, Any]:
    """Move inputs to the model's device, pictures to its dtype."""
    return {
        name: value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
        for name, value in inputs.items()
    }


def batches(prompts: Sequence[Prompt], batch_size: int) -> Iterator[list[int]]:
    """Row numbers, batch by batch: channels apart and short prompts together, so that little is padded."""
    order = sorted(range(len(prompts)), key=lambda row: (prompts[row].channel, len(prompts[row].prompt), row))
    start = 0
    while start < len(order):
        batch = [row for row in order[start : start + batch_size]]
        channel = prompts[batch[0]].channel
        batch = [row for row in batch if prompts[row].channel == channel]
        yield batch
        start += len(batch)
