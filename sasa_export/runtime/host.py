"""The gate's access to transformers' caches, masks and arguments. Comments give the version that introduced a name.

A cache is found by its class `Cache`, since the argument is `past_key_values` until 5.23 and `cache` alone from 5.40.
This module raises errors where a version lacks a name, and where the attention saw tokens that the ledger lacks.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer  # Cache: 4.36, its layers: 4.54

from sasa_export.runtime.ledger import Ledger
from sasa_export.runtime.settings import UNKNOWN
from sasa_export.runtime.version import TRIED

# Arguments of a family's forward and its decoder's, by name (4.56 and before). All other arguments are found by type.
OF_MODEL = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
OF_DECODER = ("inputs_embeds", "attention_mask", "position_ids")
UNREADABLE = "the gate of this guarded model cannot tell padding from text by this"


def check_names(forward: Callable, names: Iterable[str]) -> list[str]:
    """Return the names of a forward's arguments. Raise ImportError if one of `names` is missing."""
    taken = list(inspect.signature(forward).parameters)
    if lacking := sorted(set(names) - set(taken)):
        what = f"{forward.__qualname__} of this transformers takes no {lacking[0]}, which the gate reads"
        raise ImportError(f"{what}. Install one that it was tried on: pip install transformers=={TRIED[-1]}")
    return taken


def numbers(tokens: Any, ids: Tensor | None, embeddings: Any, model: Any) -> Tensor:
    """Return the TemplateTokens' numbers (batch, tokens) of the input: token ids, or the model's embeddings of them."""
    if ids is not None:
        return tokens.in_ids(ids)
    known = model.get_input_embeddings()(torch.tensor(tokens.table).to(embeddings.device))  # (numbers, hidden)
    return in_embeddings(embeddings, known)


def in_embeddings(embeddings: Tensor, known: Tensor) -> Tensor:
    """Return the numbers of embeddings (batch, tokens, hidden). `known` (numbers, hidden) embeds the table."""
    found, known = embeddings.float(), known.float()
    square = (known * known).sum(-1)  # (numbers,)
    apart = ((found * found).sum(-1, keepdim=True) - 2 * found @ known.T) / square + 1  # (batch, tokens, numbers)
    return torch.where(apart.amin(-1) <= 1e-3, apart.argmin(-1) + 1, 0)


def find_cache(*places: Iterable[Any]) -> Cache | None:
    """Return the cache in the first place that has one, or None. Raise ValueError where a place has two."""
    for place in places:
        found = {id(value): value for value in place if isinstance(value, Cache)}
        if len(found) > 1:
            raise ValueError("a call got two caches, and the gate cannot tell which one counts. Pass one.")
        if found:
            return found.popitem()[1]
    return None


def alone(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Return a block's arguments without the cache."""
    kept = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
    if "use_cache" in kept:
        kept["use_cache"] = False
    return tuple(None if isinstance(value, Cache) else value for value in args), kept


def read_ledger(cache: Cache | None, ledger: Ledger, count: int) -> list[Tensor]:
    """Return the ledger before a call of `count` tokens: (batch, heads, past, size) each, or an empty list. Raise
    ValueError where the attention, which has run on the call, saw another number of tokens."""
    if cache is None:
        return []
    layers = cache.layers[ledger.first :]
    # Lengths of the decoder's layers after the call, and of the ledger's before it. Static caches count in a tensor.
    lengths = (cache.get_seq_length(), cache.get_seq_length(ledger.first))
    seen, past = (int(length) if isinstance(length, Tensor) else length for length in lengths)
    if len(layers) not in (0, ledger.layers) or (seen != past + count and (seen or past)):
        raise ValueError(f"{UNKNOWN}: the attention saw {seen} tokens, and the ledger knows {past + count}.")
    return [tensor[:, :, :past] for layer in layers for tensor in (layer.keys, layer.values)] if past else []


def write_ledger(cache: Cache | None, ledger: Ledger, columns: Tensor, projection: Tensor) -> None:
    """Write a call's tokens to the ledger's layers of the cache. Add these layers if they are missing."""
    if cache is None or not cache.layers:
        return
    if len(cache.layers) == ledger.first:
        static = [layer for layer in cache.layers if isinstance(layer, StaticLayer)]
        lengths = [layer.max_cache_len for layer in static if not layer.is_sliding]  # a window is shorter than the text
        cache.layers.extend(StaticLayer(max(lengths)) if lengths else DynamicLayer() for _ in range(ledger.layers))
    packed = ledger.pack(columns.to(projection.device), projection, projection.dtype)
    for index in range(ledger.layers):
        cache.update(packed[2 * index], packed[2 * index + 1], ledger.first + index)


def real_tokens(attention_mask: Any, context: int, like: Tensor) -> Tensor:
    """Return which tokens of the context are not padding: (batch, context), bool, for the batch of `like`. The mask is
    (batch, context), or with static caches (batch, 1, tokens, keys), or a dict of one mask per type of layer."""
    mask = attention_mask
    if isinstance(mask, dict):  # the mask of layers that attend to every token
        mask = mask.get("full_attention", next(iter(mask.values()), mask))
    if mask is None:
        return torch.ones((like.shape[0], context), dtype=torch.bool, device=like.device)
    shape = mask.shape if isinstance(mask, Tensor) else ()
    if len(shape) not in (2, 4) or (len(shape) == 4 and shape[2] != like.shape[1]):
        what = f"{UNREADABLE} attention mask, a {type(mask).__name__} of the shape {tuple(shape)}"
        raise ValueError(f"{what}. Run without a static cache, or with sdpa.")
    if mask.dim() == 4:  # real if any token attends to it; the mask is bool, or 0 where attended and else very negative
        mask = (mask if mask.dtype == torch.bool else mask > -1.0).any(-2)[:, 0, :context]
    if mask.shape[1] != context:
        raise ValueError(f"{UNKNOWN}: attention_mask has {mask.shape[1]} columns, and the gate knows {context} tokens.")
    return (mask != 0).expand(like.shape[0], context)


def check_start(positions: Tensor, real: Tensor, before: Tensor | None = None) -> None:
    """Raise ValueError unless positions (axes, batch or 1, tokens) continue `before` (axes, batch, past), or start at
    0. Only each row's first real token is checked, by `real` (batch, context). Positions may count padding."""
    past = real.shape[1] - positions.shape[-1]
    first = real[:, past:] & (real[:, past:].cumsum(-1) == 1)  # (batch, tokens)
    least, most = positions[0].amin(), torch.arange(positions.shape[-1], device=real.device)  # (), (tokens,)
    if before is not None:
        least = before[0].masked_fill(~real[:, :past], -1).amax(-1)[:, None]  # (batch, 1)
        most = most + before.amax((0, 2))[:, None] + 1  # (batch, tokens)
    if (first & ((positions[0] < least) | (positions[0] > most))).any():
        raise ValueError(f"{UNKNOWN}: its positions say that tokens are missing.")
