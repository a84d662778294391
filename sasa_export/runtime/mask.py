"""Which tokens a mask shows, and whether they are those that are judged."""

from typing import Any

import torch

from sasa_export.runtime.words import last_place


def real_tokens(attention_mask: Any, past: int, tokens: int, like: torch.Tensor) -> torch.Tensor:
    """Which of the fed tokens are no padding: (batch, tokens), bool.

    The mask is (batch, past + tokens), or (batch, 1, tokens, keys) as static caches get it, one a type of layer.
    """
    return _seen(attention_mask, past + tokens, like)[:, past:]


def last_real(attention_mask: Any, tokens: int, like: torch.Tensor) -> torch.Tensor:
    """The position of each row's last real token of a whole prompt, (batch,), under any padding."""
    real = real_tokens(attention_mask, 0, tokens, like)  # (batch, tokens)
    return last_place(real, torch.arange(tokens, device=real.device))


def _seen(attention_mask: Any, context: int, like: torch.Tensor) -> torch.Tensor:
    """Which tokens of the context a mask shows: (batch, context), bool."""
    mask = _widest(attention_mask)
    if mask is None:
        return torch.ones((*like.shape[:1], context), dtype=torch.bool, device=like.device)
    if mask.dim() == 2:
        return mask[:, :context] != 0
    # A real token is one that some token sees; masks are bool, or 0 where seen and very negative elsewhere.
    seen = mask if mask.dtype == torch.bool else mask > -1.0
    return seen.any(-2)[:, 0, :context].expand(like.shape[0], context)


def _widest(attention_mask: Any) -> torch.Tensor | None:
    """The mask of the layers that attend to everything, where there is one a type of layer."""
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask.get("full_attention", next(iter(attention_mask.values())))
    return attention_mask if isinstance(attention_mask, torch.Tensor) else None


MASKED_LATER = (
    "attention_mask shows or hides tokens of past_key_values otherwise than when they were judged, so the verdict "
    "would be on another prompt. Pass the mask that they were fed with, and 1 for each new token."
)


def check_mask(attention_mask: Any, earlier: torch.Tensor, tokens: int, like: torch.Tensor, *, own: bool) -> None:
    """Raise ValueError where a call's mask would have the main lane see other tokens than are judged.

    Args:
        earlier: (batch, past), bool: which tokens of the cache were real when they came in.
        tokens: how many this call brings; like: they.
        own: did transformers itself make the mask, as `generate` does for static caches?
    """
    mask, past = _widest(attention_mask), earlier.shape[1]
    if attention_mask is None or (own and mask is None):
        wrong = ~earlier
    elif not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        if not own:
            raise NotImplementedError(
                "attention_mask must be (batch, tokens), 1 for each real token: what other masks show cannot be judged."
            )
        assert mask is not None
        if mask.shape[-1] < past + tokens:  # keys of a window alone
            return
        seen = _seen(mask, past + tokens, like)  # (batch, context)
        wrong = (seen[:, :past] != earlier) & seen.any(-1, keepdim=True)  # (batch, past)
    else:
        if attention_mask.shape[1] != past + tokens:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} columns for {past} tokens of past_key_values and "
                f"{tokens} new ones. Pass one column for each of them."
            )
        wrong = (attention_mask[:, :past] != 0) != earlier  # (batch, past)
    if past and wrong.any():
        raise ValueError(MASKED_LATER)


def is_sound(projection: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Is a token's state a number, or the token no real one? (batch, tokens), bool. Nothing could judge the others.

    Args: projection (batch, tokens, hidden); real (batch, tokens), bool.
    """
    number = (projection * 0).sum(-1) == 0  # (batch, tokens); infinity and NaN make NaN
    return number.to(real.device) | ~real
