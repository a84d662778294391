"""The probe's features: the states of both lanes at the last prompt position, for every prompt."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from sasa_export.errors import OpenError, reworded
from sasa_export.graph import LayerGraph
from sasa_export.graph.trace import check_traces, trace
from sasa_export.models import Source
from sasa_export.models.load import load_model, place
from sasa_export.probe.work import Results, Work
from sasa_export.prompts.prompt import Prompt, batches, encode
from sasa_export.report import Silent

MAIN = "main"  # the main lane's input of the final norm


@dataclass(frozen=True)
class Features:
    """The features of the second lane and of the main lane at the last prompt token: (prompts, features), float32.

    Features are normed hidden states, or logits where the graph has a head in the lane.
    """

    projected: np.ndarray
    plain: np.ndarray


@contextmanager
def reading(model: Any, processor: Any, graph: LayerGraph) -> Iterator[Callable[[Sequence[Prompt]], Features]]:
    """Watch the model while the context lasts. Yield a function that runs both lanes over a batch of prompts.

    Args: graph: the rewritten lane (`rewrite_lane`), executed by the code that the patched model carries.
    """
    import torch

    from sasa_export.runtime.lane import Recording, current_recording, run_lane, within

    nodes = graph.to_json()
    end = next(node for node in nodes if node["op"] == "lane_norm")
    head = [node for node in nodes if node["op"] == "lane_head"][:1]
    plain = [{**end, "inputs": [MAIN]}, *head]  # the last nodes of the second lane, applied to the main lane
    norm = model.get_submodule(graph["norm"].module)
    seen_norm: list[torch.Tensor] = []

    def read(prompts: Sequence[Prompt]) -> Features:
        inputs = place(encode(processor, prompts), model)
        seen_norm.clear()
        with torch.no_grad(), within(current_recording, Recording()) as seen:
            model(**inputs, use_cache=False, logits_to_keep=1)
        with torch.no_grad():
            lane = end_of_lane(model, nodes, seen, inputs)  # (batch, features)
            main = run_lane(model, plain, {MAIN: seen_norm[0]}, {}, last_real(inputs))[plain[-1]["name"]]
        return Features(lane.float().cpu().numpy(), main.float().cpu().numpy())

    handle = norm.register_forward_hook(lambda module, args, output: seen_norm.append(args[0]))
    try:
        with watching(model, nodes):
            yield read
    finally:
        handle.remove()


@contextmanager
def watching(model: Any, nodes: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Watch the decoder and its blocks (`sasa_export.runtime.lane.watch`) while the context lasts."""
    from sasa_export.runtime.lane import watch

    classes = {module: type(module) for module in model.modules()}
    watched = watch(model, list(nodes))
    try:
        yield
    finally:
        for module in watched:
            module.__class__ = classes[module]
            del module._sasa_watched


def end_of_lane(model: Any, nodes: Sequence[dict[str, Any]], seen: Any, inputs: dict[str, Any]) -> Any:
    """Return the output of the second lane's last node at each prompt's last token, (batch, features). The main lane
    must have run over the whole prompts and filled the Recording `seen`."""
    import torch

    from sasa_export.runtime.lane import TYPES, at_judged, context_arguments, reached, run_lane, start
    from sasa_export.runtime.ledger import Ledger

    graph, at = list(nodes), last_real(inputs)
    node, states, outputs = start(graph, seen)  # (batch, tokens, hidden)
    judged = at_judged(outputs, at)  # (batch, 1, hidden) each
    real, axes = _real(inputs), Ledger.of(model.config.get_text_config(decoder=True)).axes
    positions = torch.arange(real.shape[1], device=real.device) if seen.position_ids is None else seen.position_ids
    positions = (positions if positions.dim() > 2 else positions[None])[-axes:].expand(axes, *real.shape)
    positions = positions if axes > 1 else positions[0]  # (axes, batch, tokens), or (batch, tokens)
    types = next((inputs[name] for name in TYPES if name in inputs), torch.zeros_like(real.long()))
    at, real, states, *others = reached(graph, at, real, states, positions, types)
    arguments = context_arguments(model, graph, states, real.long(), *others)
    return run_lane(model, graph, {**judged, node: states}, arguments, at)[graph[-1]["name"]]


def last_real(inputs: dict[str, Any]) -> Any:
    """Return the position of each row's last real token, (batch,), under any padding."""
    import torch

    real = _real(inputs)  # (batch, tokens)
    return torch.where(real, torch.arange(real.shape[1], device=real.device), 0).amax(-1)


def _real(inputs: dict[str, Any]) -> Any:
    from sasa_export.runtime.host import real_tokens

    ids = inputs["input_ids"]  # (batch, tokens)
    return real_tokens(inputs.get("attention_mask"), ids.shape[1], ids)  # (batch, tokens)


def collect(
    model: Any,
    processor: Any,
    graph: LayerGraph,
    prompts: Sequence[Prompt],
    *,
    batch_size: int,
    advance: Callable[[int], None] = lambda count: None,
) -> Features:
    """Return the features of all prompts from both lanes, without `workers` and without a folder.

    Args:
        graph: the rewritten lane (`rewrite_lane`), executed by the code that the patched model carries.
        advance: called with the number of prompts done since the last call.
    """
    rows, parts = list(batches(prompts, batch_size)), []
    with reading(model, processor, graph) as read:
        for batch in rows:
            parts.append(read([prompts[row] for row in batch]))
            advance(len(batch))
    order = np.argsort(np.concatenate(rows))
    projected, plain = ([getattr(part, lane) for part in parts] for lane in ("projected", "plain"))
    return Features(np.concatenate(projected)[order], np.concatenate(plain)[order])


def collect_on_disk(
    model: Any,
    processor: Any,
    graph: LayerGraph,
    prompts: Sequence[Prompt],
    work: Work,
    report: Silent,
    *,
    batch_size: int,
    kind: str = "calibrate",
) -> Features:
    """Return features as `collect` does. Store each batch in `work` under `kind`, so that a later run can resume."""
    lane = hashlib.sha256(repr(graph.to_json()).encode()).hexdigest()[:16]
    names = (f"projected-{lane}", f"plain-{lane}")
    results = Results(work, kind, prompts, batch_size)
    with reading(model, processor, graph) as read:

        def compute(some: list[Prompt], missing: list[str]) -> Iterator[tuple[str, np.ndarray]]:
            features = read(some)
            arrays = dict(zip(names, (features.projected, features.plain), strict=True))
            return ((name, arrays[name]) for name in missing)

        results.fill(names, compute, report)
    return Features(*map(results.read, names))


def load_as_traced(
    source: Source, processor: Any, graph: LayerGraph, prompts: Sequence[Prompt], *, dtype: str, device: str
) -> Any:
    """Return the loaded model after tracing it with its weights on one prompt, with a picture if any prompt has one.

    Raise OpenError where the model does not run here, and TraceError where its trace differs from `graph`.
    """
    model = load_model(source, dtype=dtype, device=device)
    prompt = next((prompt for prompt in prompts if prompt.image is not None), prompts[0])
    inputs = place(encode(processor, [prompt]), model)
    message = (  # for errors of kernels that support only some types and sizes
        f"{source.name} was loaded, and does not run here in {model.dtype} ({{reason}}). Try another --dtype or "
        "--device; if it is quantized, give the model that it was quantized from."
    )
    with reworded(OpenError, message):
        check_traces(graph, trace(model, source.family, inputs))
    return model
