"""SASA recomputed naively, to judge the product by: two full passes of the stock model, with forward hooks.

Nothing is saved or shared between the passes, no cache is used, and the probe works on whole logits. Blocks
are counted from zero. Every function takes the unpatched transformers model.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

EPS = 1e-6

# Where families keep their decoder blocks, by model_type.
BLOCKS: dict[str, str] = defaultdict(
    lambda: "model.language_model.layers",
    dict.fromkeys(("smolvlm", "idefics2", "idefics3"), "model.text_model.layers"),
    llama4="language_model.model.layers",
)
# By what logits are multiplied behind the head; other families have such a field and do not.
SCALED = {"granite4_vision": lambda text: 1 / text.logits_scaling, "aya_vision": lambda text: text.logit_scale}
# By which families tell the tokens of pictures from those of text.
TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")


def project(safety: Tensor, semantic: Tensor, eps: float = EPS) -> Tensor:
    """The component of each safety state along its semantic state, token by token, computed in float32."""
    h_s, h_f = safety.float(), semantic.float()  # (batch, tokens, hidden)
    inner = (h_s * h_f).sum(dim=-1, keepdim=True)  # (batch, tokens, 1)
    norm2 = (h_f * h_f).sum(dim=-1, keepdim=True)  # (batch, tokens, 1)
    return (inner / norm2.clamp_min(eps) * h_f).to(safety.dtype)  # (batch, tokens, hidden)


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks of a stock model."""
    found = model.get_submodule(BLOCKS[model.config.model_type])
    assert isinstance(found, nn.ModuleList)
    return found


def block_outputs(model: PreTrainedModel, inputs: Mapping[str, Any], layers: tuple[int, ...]) -> dict[int, Tensor]:
    """Pass 1: the outputs of blocks `layers`, each (batch, tokens, hidden).

    They are taken by hooks: `output_hidden_states` gives the last block's output only after the final norm.
    """
    seen: dict[int, Tensor] = {}

    def record(layer: int, _module: nn.Module, _args: Any, output: Any) -> None:
        assert layer not in seen, "a block ran twice in one pass"
        seen[layer] = _hidden(output).clone()  # (batch, tokens, hidden)

    with _hooks(model, {layer: partial(record, layer) for layer in layers}):
        _all_logits(model, inputs)
    return seen


def logits_with_state(model: PreTrainedModel, inputs: Mapping[str, Any], layer: int, state: Tensor) -> Tensor:
    """Pass 2: the logits (batch, vocabulary) when block `layer` is made to put out `state`."""

    def replace(_module: nn.Module, _args: Any, output: Any) -> Any:
        assert _hidden(output).shape == state.shape
        return (state, *output[1:]) if isinstance(output, tuple) else state  # (batch, tokens, hidden)

    with _hooks(model, {layer: replace}):
        return _last(_all_logits(model, inputs), inputs)


def oracle_logits(model: PreTrainedModel, inputs: Mapping[str, Any], safety_layer: int, semantic_layer: int) -> Tensor:
    """SASA's logits (batch, vocabulary) at each row's last prompt token."""
    seen = block_outputs(model, inputs, (safety_layer, semantic_layer))
    projected = project(seen[safety_layer], seen[semantic_layer])  # (batch, tokens, hidden)
    return logits_with_state(model, inputs, safety_layer, projected)


def reaching_logits(
    model: PreTrainedModel, inputs: Mapping[str, Any], safety_layer: int, semantic_layer: int, reach: int
) -> Tensor:
    """SASA's logits (batch, vocabulary) where the second pass is on the last `reach` real tokens of each row alone.

    Row by row, so that it needs no padding: the states of these tokens, at the positions that pass 1 gave them.
    """
    places: list[Any] = []  # of the decoder first, then of a block, None where they are not told
    look = partial(_look_at_positions, places)
    decoder = model.get_submodule(BLOCKS[model.config.model_type].removesuffix(".layers"))
    handles = [module.register_forward_pre_hook(look, with_kwargs=True) for module in (decoder, blocks(model)[0])]
    try:
        seen = block_outputs(model, inputs, (safety_layer, semantic_layer))
    finally:
        for handle in handles:
            handle.remove()
    projected = project(seen[safety_layer], seen[semantic_layer])  # (batch, tokens, hidden)
    told = next((found for found in places if found is not None), torch.arange(projected.shape[1])[None])
    rows = []
    for row, mask in enumerate(inputs["attention_mask"]):
        columns = mask.nonzero()[:, 0][-reach:]  # (reached,)
        # Whatever embeddings come in, block `safety_layer` puts out the states.
        alone: dict[str, Any] = {"inputs_embeds": torch.zeros_like(projected[:1, columns])}  # (1, reached, hidden)
        alone["attention_mask"] = torch.ones(1, len(columns), dtype=torch.long)
        alone["position_ids"] = told[..., min(row, told.shape[-2] - 1), :][..., columns].unsqueeze(-2)
        alone |= {name: inputs[name][row, columns][None] for name in TYPES if name in inputs}
        rows.append(logits_with_state(model, alone, safety_layer, projected[row, columns][None]))
    return torch.cat(rows)  # (batch, vocabulary)


def _look_at_positions(places: list[Any], _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
    places.append(kwargs.get("position_ids"))  # (batch or 1, tokens), or (axes, batch, tokens)


def lane_logits(
    model: PreTrainedModel, inputs: Mapping[str, Any], safety_layer: int, semantic_layer: int, reach: int | None
) -> Tensor:
    """SASA's logits (batch, vocabulary), of a lane over all tokens where there is no `reach`."""
    if reach is None:
        return oracle_logits(model, inputs, safety_layer, semantic_layer)
    return reaching_logits(model, inputs, safety_layer, semantic_layer, reach)


def normed_states(model: PreTrainedModel, inputs: Mapping[str, Any], layers: tuple[int, ...]) -> Tensor:
    """What the head reads (batch, layers * hidden) at each row's last prompt token where the last block is made to put
    out the state of one of the `layers`, side by side."""
    head, seen, found = model.get_output_embeddings(), block_outputs(model, inputs, layers), []
    handle = head.register_forward_pre_hook(lambda _module, args: found.append(args[0]))  # (batch, tokens, hidden)
    try:
        for layer in layers:
            logits_with_state(model, inputs, len(blocks(model)) - 1, seen[layer])
    finally:
        handle.remove()
    return torch.cat([_last(states, inputs) for states in found], dim=-1)


def plain_logits(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """The untouched model's logits (batch, vocabulary) at each row's last prompt token."""
    return _last(_all_logits(model, inputs), inputs)


def unsafe_probability(logits: Tensor, weight: Tensor, bias: float | Tensor) -> Tensor:
    """P(unsafe) of each row (batch,), by the probe `weight` (vocabulary,) on logits (batch, vocabulary)."""
    return torch.sigmoid(logits.float() @ weight.float() + bias)  # (batch,)


def folded(model: PreTrainedModel, weight_vocab: Tensor) -> Tensor:
    """The probe `weight_vocab` (vocabulary,) moved in front of the head: W_head^T w, of shape (hidden,)."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear) and head.bias is None
    scale = SCALED.get(model.config.model_type, lambda text: 1.0)(model.config.get_text_config())
    return head.weight.detach().float().T @ weight_vocab.float() * scale  # (hidden,)


def last_positions(inputs: Mapping[str, Any]) -> Tensor:
    """The column (batch,) of each row's last real token, under padding on either side."""
    mask = inputs["attention_mask"]  # (batch, tokens)
    columns = torch.arange(mask.shape[1], device=mask.device)  # (tokens,)
    return (mask * columns).argmax(dim=1)  # (batch,)


def _all_logits(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """One full pass, no cache: logits of every position (batch, tokens, vocabulary)."""
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def _last(logits: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Logits (batch, vocabulary) of each row's last real token."""
    rows = torch.arange(logits.shape[0])  # (batch,)
    return logits[rows, last_positions(inputs)]  # (batch, vocabulary)


def _hidden(output: Any) -> Tensor:
    """The hidden state in a block's output, which some families and versions wrap in a tuple."""
    return output[0] if isinstance(output, tuple) else output  # (batch, tokens, hidden)


@contextmanager
def _hooks(model: PreTrainedModel, hooks: Mapping[int, Any]) -> Iterator[None]:
    """Forward hooks on the numbered blocks, for the length of a `with` block."""
    decoder = blocks(model)
    handles = [decoder[layer].register_forward_hook(hook) for layer, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
