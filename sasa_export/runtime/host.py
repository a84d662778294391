"""What the gate reads of transformers' caches, masks and arguments: each name, and the version that brought it.

A cache is found by being a `Cache`, whatever an argument is called: `past_key_values` until 5.23, `cache` since 5.24. A
name that another version lacks raises here, and so does a context that the attention saw and the ledger does not know.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer  # Cache: 4.36, with layers: 4.54

from sasa_export.runtime.ledger import Ledger
from sasa_export.runtime.version import TRIED

# What a family's forward and its decoder's take by name (4.56 and before); others are looked for by what they are.
OF_MODEL = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
OF_DECODER = ("inputs_embeds", "attention_mask", "position_ids")
UNREADABLE = "the gate of this guarded model cannot tell padding from text by this"
UNKNOWN = "The gate of this guarded model has not judged what stands before this call. Start from the whole prompt"


def check_names(forward: Callable, names: Iterable[str]) -> list[str]:
    """The names of a forward's arguments. ImportError where it takes none by one of these."""
    taken = list(inspect.signature(forward).parameters)
    if lacking := sorted(set(names) - set(taken)):
        what = f"{forward.__qualname__} of this transformers takes no {lacking[0]}, which the gate reads"
        raise ImportError(f"{what}. Install one that it was tried on: pip install transformers=={TRIED[-1]}")
    return taken


def find_cache(*places: Iterable[Any]) -> Cache | None:
    """The cache in the first of these places that has one. ValueError where a place has two."""
    for place in places:
        found = {id(value): value for value in place if isinstance(value, Cache)}
        if len(found) > 1:
            raise ValueError("a call got two caches, and the gate cannot tell which one counts. Pass one.")
        if found:
            return found.popitem()[1]
    return None


def alone(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Arguments of a block without the cache in them."""
    kept = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
    if "use_cache" in kept:
        kept["use_cache"] = False
    return tuple(None if isinstance(value, Cache) else value for value in args), kept


def read_ledger(cache: Cache | None, ledger: Ledger, count: int) -> list[Tensor]:
    """What a cache keeps of the tokens before the `count` of a call that has run: (batch, heads, past, size) each, or
    nothing. ValueError where the attention saw another number of tokens than the ledger knows."""
    if cache is None:
        return []
    layers = cache.layers[ledger.first :]
    # Of the decoder's own layers after the call, and of the ledger's before it. Static caches count in a tensor.
    lengths = (cache.get_seq_length(), cache.get_seq_length(ledger.first))
    seen, past = (int(length) if isinstance(length, Tensor) else length for length in lengths)
    if len(layers) not in (0, ledger.layers) or (seen != past + count and (seen or past)):
        raise ValueError(f"{UNKNOWN}: the attention saw {seen} tokens, and the ledger knows {past + count}.")
    return [tensor[:, :, :past] for layer in layers for tensor in (layer.keys, layer.values)] if past else []


def write_ledger(cache: Cache | None, ledger: Ledger, columns: Tensor, projection: Tensor) -> None:
    """Write a call's tokens into the ledger's layers of the cache, which are added where they are missing."""
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
    """Which tokens of the context are no padding: (batch, context), bool, for the batch of `like`. The mask is (batch,
    context), or (batch, 1, tokens, keys) as static caches get it, one a type of layer."""
    mask = attention_mask
    if isinstance(mask, dict):  # that of the layers which attend to everything
        mask = mask.get("full_attention", next(iter(mask.values()), mask))
    if mask is None:
        return torch.ones((like.shape[0], context), dtype=torch.bool, device=like.device)
    shape = mask.shape if isinstance(mask, Tensor) else ()
    if len(shape) not in (2, 4) or (len(shape) == 4 and shape[2] != like.shape[1]):
        what = f"{UNREADABLE} attention mask, a {type(mask).__name__} of the shape {tuple(shape)}"
        raise ValueError(f"{what}. Run without a static cache, or with sdpa.")
    if mask.dim() == 4:  # a real token is one that some token sees; bool, or 0 where seen and very negative elsewhere
        mask = (mask if mask.dtype == torch.bool else mask > -1.0).any(-2)[:, 0, :context]
    if mask.shape[1] != context:
        raise ValueError(f"{UNKNOWN}: attention_mask has {mask.shape[1]} columns, and the gate knows {context} tokens.")
    return (mask != 0).expand(like.shape[0], context)


def check_start(positions: Tensor, real: Tensor, before: Tensor | None = None) -> None:
    """ValueError where the positions (axes, batch or 1, tokens) of a call do not go on, at a row's first real token by
    `real` (batch, context), from those `before` it, (axes, batch, past), or from 0. Padding may be counted or not."""
    past = real.shape[1] - positions.shape[-1]
    first = real[:, past:] & (real[:, past:].cumsum(-1) == 1)  # (batch, tokens)
    least, most = positions[0].amin(), torch.arange(positions.shape[-1], device=real.device)  # (), (tokens,)
    if before is not None:
        least = before[0].masked_fill(~real[:, :past], -1).amax(-1)[:, None]  # (batch, 1)
        most = most + before.amax((0, 2))[:, None] + 1  # (batch, tokens)
    if (first & ((positions[0] < least) | (positions[0] > most))).any():
        raise ValueError(f"{UNKNOWN}: its positions say that tokens are missing.")
