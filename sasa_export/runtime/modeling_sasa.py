"""A vision-language model that carries its own guard (SASA, arXiv 2507.21637).

The model judges every prompt before it says a word. The idea, with h_s and h_f the outputs of the safety
block s and the semantic block f over the prompt:

    project(h_s, h_f)      = <h_s, h_f> / max(|h_f|^2, epsilon) * h_f      # (batch, tokens, hidden), float32
    second lane(p)         = norm(block_{L-1}(... block_{s+1}(p)))[judged] # (batch, hidden), the same weights
    unsafe_probability(x)  = sigmoid(w . x + b)                            # (batch,)
    gate(logits, verdict)  = logits, or the next token of the refusal      # (batch, kept, vocabulary)

`config.sasa["graph"]` lists these steps as nodes; this file executes them and knows no model family. Its
last lines name the classes of the family that this directory holds.
"""

import contextlib
import contextvars
import copy
import functools
import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

FORMAT = 2  # of config.sasa; a directory of another format is refused
SEAL = "guarded by SASA: load it with AutoModelForImageTextToText.from_pretrained(..., trust_remote_code=True)"
LANE = ("tap", "projection", "lane_block", "lane_norm", "lane_head", "join", "probe", "gate")  # what SASA adds
PROMPT, EVERY_TOKEN = "prompt", "every-token"  # what config.sasa["gate"] has judged
PACKED = "prompts packed into one row cannot be judged one by one. Run without it."
HOW_TO_LOAD = "Load the directory as sasa-export wrote it, or export it again."

# Logits of a refused row. The order is what counts: where a generation option forbids the wanted token, another
# word of the refusal follows, and where none is left the answer ends.
WANTED, REFUSAL, END, OTHER = 0.0, -5e2, -1e3, -1e4

if int(transformers.__version__.split(".")[0]) != 5:
    raise ImportError(
        f"this guarded model needs transformers 5, and {transformers.__version__} is installed. "
        "Install it with: pip install 'transformers>=5,<6'"
    )


# ------------------------------------------------------------------------------------------- the formulas


def project(safety: torch.Tensor, semantic: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The component of the safety state along the semantic state, token by token (the paper's Eq. 8).

    Args: both states (batch, tokens, hidden). Returns the same shape, in the dtype of `semantic`; the
    arithmetic is float32, since |h_f|^2 overflows half precision at massive activations.
    """
    h_s, h_f = safety.float(), semantic.float()  # (batch, tokens, hidden)
    alpha = (h_s * h_f).sum(-1, keepdim=True) / (h_f * h_f).sum(-1, keepdim=True).clamp_min(epsilon)
    return (alpha * h_f).to(semantic.dtype)  # (batch, tokens, hidden)


def unsafe_probability(state: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Logistic regression on the lane's state (..., features): P(unsafe), (...), float32."""
    return torch.sigmoid((state.float() * weight.float()).sum(-1) + bias.float())


def gate(logits: torch.Tensor, wanted: torch.Tensor, refused: torch.Tensor, refusal: tuple[int, ...]) -> torch.Tensor:
    """Force the refusal where a position is refused, and leave every other logit untouched.

    Args:
        logits: (batch, kept, vocabulary).
        wanted: (batch, kept), the token of the refusal that is due.
        refused: (batch, kept), bool.
        refusal: the refusal's token ids, end of sequence last.
    """
    others = torch.full(logits.shape[-1:], OTHER, dtype=logits.dtype, device=logits.device)  # (vocabulary,)
    others[list(refusal)] = REFUSAL
    others[refusal[-1]] = END
    forced = others.expand_as(logits).scatter(-1, wanted.unsqueeze(-1), WANTED)  # (batch, kept, vocabulary)
    return torch.where(refused.unsqueeze(-1), forced, logits)


# -------------------------------------------------------------------------------- what the cache keeps of a token
#
# A verdict must not depend on how a prompt is fed, so the gate keeps a ledger: for each token a few small
# integers and its projected state, packed into extra layers of the KV cache, after the model's own. Beams, batches,
# crops and resets carry it as they carry keys and values, and the second lane can run over the whole context at any
# call. All integers stay below 256, which every float type holds exactly.

# Its columns. STATE is 0, or k + 1 where token k of the refusal is due; JUDGED is 1 where a verdict covers the token.
STATE, SYMBOL, REAL, PICTURE, JUDGED, POSITION = range(6)
DIGITS, BASE = 3, 128  # of a position, one column each


@dataclass(frozen=True)
class Ledger:
    """The shape of the ledger for one decoder."""

    first: int  # index of the first extra cache layer
    heads: int
    size: int  # of a head
    hidden: int  # of all projected states
    axes: int  # of a position: three in families with M-RoPE
    lanes: int  # each has a projected state

    @classmethod
    def of(cls, text: Any, sasa: dict[str, Any]) -> "Ledger":
        """The ledger of a text configuration. A lane that keeps its own cache needs no projected states in it."""
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        axes = 3 if "mrope_section" in (getattr(text, "rope_parameters", None) or {}) else 1
        lanes = len(_entries(sasa["graph"]))
        hidden = 0 if sasa["gate"] == EVERY_TOKEN else lanes * text.hidden_size
        return cls(text.num_hidden_layers, text.num_key_value_heads, size, hidden, axes, lanes)

    @property
    def columns(self) -> int:
        return POSITION + self.axes * DIGITS

    @property
    def layers(self) -> int:
        """How many cache layers hold it."""
        return -(-(self.columns + self.hidden) // (2 * self.heads * self.size))

    def pack(self, columns: torch.Tensor, projection: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        """Columns (batch, tokens, columns) and projection (batch, tokens, hidden) as keys, values, keys, values ...

        Each is (batch, heads, tokens, size), like those of every other layer.
        """
        flat = torch.cat([columns.to(dtype), projection.to(dtype)], dim=-1)  # (batch, tokens, columns + hidden)
        room = 2 * self.layers * self.heads * self.size
        flat = nn.functional.pad(flat, (0, room - flat.shape[-1]))  # (batch, tokens, room)
        flat = flat.unflatten(-1, (2 * self.layers * self.heads, self.size))
        return list(flat.transpose(1, 2).split(self.heads, dim=1))

    def unpack(self, tensors: list[torch.Tensor], start: int, stop: int) -> torch.Tensor:
        """The places start..stop-1 of every token's row: (batch, tokens, stop - start)."""
        width = self.heads * self.size
        parts = []
        for index in range(start // width, -(-stop // width)):
            low, high = max(start - index * width, 0), min(stop - index * width, width)
            heads = tensors[index][:, low // self.size : -(-high // self.size)]  # (batch, heads, tokens, size)
            rows = heads.transpose(1, 2).flatten(2)  # (batch, tokens, heads * size)
            skipped = low // self.size * self.size
            parts.append(rows[..., low - skipped : high - skipped])
        return torch.cat(parts, dim=-1)

    def unpack_columns(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """(batch, tokens, columns), int64."""
        return self.unpack(tensors, 0, self.columns).round().long()

    def unpack_projection(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """(batch, tokens, hidden)."""
        return self.unpack(tensors, self.columns, self.columns + self.hidden)

    def digits(self, positions: torch.Tensor) -> torch.Tensor:
        """Positions (axes, batch, tokens) as columns (batch, tokens, axes * digits)."""
        steps = torch.tensor([BASE**-power for power in range(DIGITS)], device=positions.device)  # (digits,), exact
        found = torch.fmod(torch.floor(positions[..., None].float() * steps), BASE)
        return found.permute(1, 2, 0, 3).flatten(2)

    def positions(self, columns: torch.Tensor) -> torch.Tensor:
        """The positions that all columns (batch, tokens, columns) hold: (batch, tokens), or (axes, batch, tokens)."""
        digits = columns[..., POSITION:].unflatten(-1, (self.axes, DIGITS))  # (batch, tokens, axes, digits)
        found = sum(digits[..., power] * BASE**power for power in range(DIGITS)).permute(2, 0, 1)
        return found[0] if self.axes == 1 else found


# ---------------------------------------------------------------------------------------- where a prompt ends
#
# A prompt ends where the chat template's generation prompt is complete, however it came in; what follows is the
# answer, until another turn begins. Text without one is a prompt to the end of each call that brings several tokens,
# and, as long as none did, of each that brings one.


@dataclass(frozen=True)
class Words:
    """The tokens that the gate knows, as symbols: token `table[i]` is i + 1, any other is 0."""

    table: tuple[int, ...]
    generation_prompt: tuple[int, ...]
    turns: tuple[int, ...]  # a token of these ends an answer
    refusal: tuple[int, ...]

    @classmethod
    def of(cls, sasa: dict[str, Any]) -> "Words":
        """The words of config.sasa."""
        lists = [sasa["generation_prompt_ids"], sasa["turn_token_ids"], sasa["refusal_token_ids"]]
        table = sorted(set().union(*lists))
        symbol = {token: index + 1 for index, token in enumerate(table)}
        return cls(tuple(table), *(tuple(symbol[token] for token in tokens) for tokens in lists))

    def in_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """The symbols of token ids (batch, tokens)."""
        table = torch.tensor(self.table, device=ids.device)  # (symbols,)
        order = torch.arange(1, len(self.table) + 1, device=ids.device)  # (symbols,)
        return ((ids[..., None] == table) * order).sum(-1)

    def in_embeddings(self, embeddings: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """The symbols of embeddings (batch, tokens, hidden), by the embeddings of the table (symbols, hidden)."""
        found, known = embeddings.float(), known.float()
        square = (known * known).sum(-1)  # (symbols,)
        apart = (found * found).sum(-1, keepdim=True) - 2 * found @ known.T + square  # (batch, tokens, symbols)
        apart = apart / square  # (batch, tokens, symbols), relative
        return torch.where(apart.amin(-1) <= 1e-3, apart.argmin(-1) + 1, 0)


@dataclass(frozen=True)
class Turn:
    """What one call brings, row by row."""

    judged: torch.Tensor  # (batch,), the position in the context whose state the probe reads
    due: torch.Tensor  # (batch,), bool: a verdict is due in this call
    refused_states: torch.Tensor  # (batch, tokens), STATE of the fed tokens where the verdict is to refuse
    other_states: torch.Tensor  # (batch, tokens), STATE of the fed tokens where no verdict is due
    covered: torch.Tensor  # (batch, tokens), bool: a verdict covers the fed token
    answer: torch.Tensor  # (batch, tokens), bool: real tokens that no verdict on the prompt is about
    rank: torch.Tensor  # (batch, tokens), real tokens so far

    def states(self, refused: torch.Tensor) -> torch.Tensor:
        """STATE of the fed tokens, (batch, tokens), when `refused` (batch,) are the verdicts."""
        judged = self.refused_states * refused[:, None]
        return torch.where(self.due[:, None], judged, self.other_states)

    def late_states(self, states: torch.Tensor, unsafe: torch.Tensor, longest: int) -> torch.Tensor:
        """`states`, and a refusal from the first answer token on that is unsafe, (batch, tokens) bool."""
        turned = (unsafe & self.answer & (states == 0)).long().cumsum(-1) > 0  # (batch, tokens)
        begun = torch.where(turned, self.rank, self.rank[:, -1:] + 1).amin(-1, keepdim=True)  # (batch, 1)
        late = (self.rank - begun + 1).clamp(0, longest)  # (batch, tokens)
        return torch.where(turned & (states == 0), late, states)


def read_turn(
    symbols: torch.Tensor,
    real: torch.Tensor,
    past: Any,
    several: Any,
    before: torch.Tensor,
    covered: torch.Tensor,
    words: Words,
    prompt_end: int | None = None,
) -> Turn:
    """Find where the prompt of each row ends, and whether this call completes it.

    Args:
        symbols: (batch, context), of the whole context; real: the same shape, False at padding.
        past: the number of tokens that the cache held before this call.
        several: is this the first call, or one of several tokens? A bool, or () bool.
        before: (batch,), STATE before this call.
        covered: (batch, context), bool, JUDGED of the context; False at the fed tokens.
        prompt_end: where the prompt ends for whoever knows it, as `generate` does; no verdict is due behind it.
    """
    index = torch.arange(symbols.shape[1], device=symbols.device)  # (context,)
    rank = real.long().cumsum(-1)  # (batch, context), real tokens so far
    prompt = real if prompt_end is None else real & (index < prompt_end)
    last = _last(prompt, index)  # (batch,)
    opened = _last(_ends_of(words.generation_prompt, symbols, real, rank) & prompt, index, -1)  # (batch,)
    turned = (symbols[..., None] == torch.tensor(words.turns, device=symbols.device)).any(-1)  # (batch, context)
    answering = (opened >= 0) & ~(turned & prompt & (index > opened[:, None])).any(-1)  # (batch,)
    judged = torch.where(answering, opened, last)  # (batch,)
    # Due is a verdict on a prompt that ends in this call, and on one in the cache that has none yet, as whoever crops a
    # conversation back behind an earlier prompt will find.
    known = covered.gather(1, judged[:, None])[:, 0]  # (batch,)
    inherited = (covered & (index == past - 1)).any(-1)  # (batch,)
    closed = several | ~inherited if prompt_end is None else symbols.shape[1] >= prompt_end
    brings = (real & (index >= past)).sum(-1)  # (batch,), real tokens of this call
    due = (brings > 0) & ((judged >= past) | ~known) & (answering | closed)
    lasts = answering | (brings > 1) | (prompt_end is not None)  # (batch,), the verdict, beyond this call

    new = index[past:]  # (tokens,)
    follows = before[:, None] + (rank[:, past:] - rank[:, past:][:, :1] + real[:, past:].long()[:, :1])
    behind = rank[:, past:] - rank.gather(1, judged[:, None])  # (batch, tokens), real tokens behind the judged one
    refusal = torch.tensor(words.refusal, device=symbols.device)
    wanted = refusal[(behind - 1).clamp(0, len(words.refusal) - 1)]  # (batch, tokens)
    strays = (behind > 0) & real[:, past:] & (symbols[:, past:] != wanted)  # (batch, tokens)
    along = strays.long().cumsum(-1) == 0  # (batch, tokens): nothing but the refusal stands behind the prompt
    spelled = torch.where(along, behind.clamp_min(0), 0)  # (batch, tokens)
    end = _last(real, index)  # (batch,)
    if prompt_end is None:  # text that comes a token at a time, and now the word that was forced
        forced = symbols.gather(1, end[:, None])[:, 0] == refusal[(before - 1).clamp_min(0)]  # (batch,)
        due = due & ~(forced & (before > 0) & ~lasts & ~torch.as_tensor(several, device=due.device))
    restarted = _spelled_at_the_end(words.refusal, symbols, real, rank, judged)  # (batch,)
    spelled = torch.where(new >= end[:, None], restarted[:, None], spelled)
    states = (spelled + 1).clamp_max(len(words.refusal)) * (new >= judged[:, None])  # (batch, tokens)
    # A refusal under way goes on with each token, and begins anew behind an answer that its prompt still brings.
    still = several if prompt_end is None else symbols.shape[1] <= prompt_end
    follows = torch.where((new >= end[:, None]) & still, restarted[:, None] + 1, follows)
    other_states = torch.where(before[:, None] > 0, follows.clamp_max(len(words.refusal)), 0)  # (batch, tokens)
    answer = real[:, past:] & ((new > judged[:, None]) | ~due[:, None])  # (batch, tokens)
    reached = ((due & lasts)[:, None] & (new >= judged[:, None])) | (~due & inherited)[:, None]  # (batch, tokens)
    return Turn(judged, due, states, other_states, reached, answer, rank[:, past:])


def goes_on(last: torch.Tensor, symbols: torch.Tensor, words: Words) -> torch.Tensor:
    """Rows (batch,) in which one more token is an answer's for sure, so that `read_turn` has nothing to find.

    A verdict covers the token before it, and no generation prompt ends in it.

    Args:
        last: (batch, columns), the ledger of the token before; symbols: (batch, 1).
    """
    covered = last[:, JUDGED] > 0
    return covered & (symbols[:, 0] != words.generation_prompt[-1]) if words.generation_prompt else covered


def states_going_on(before: torch.Tensor, real: torch.Tensor, words: Words) -> torch.Tensor:
    """STATE (batch, tokens) of a token that goes on with an answer or a refusal.

    Args: before (batch,), STATE of the token before; real (batch, tokens), bool.
    """
    following = (before[:, None] + real.long()).clamp_max(len(words.refusal))  # (batch, tokens)
    return torch.where(before[:, None] > 0, following, 0)


def earlier_answers(
    symbols: torch.Tensor, real: torch.Tensor, past: int, judged: torch.Tensor, words: Words
) -> torch.Tensor:
    """Where the fed tokens hold answers of earlier turns: (batch, tokens).

    That is the position among the fed tokens of the generation prompt which a token answers, or -1.
    """
    index = torch.arange(symbols.shape[1], device=symbols.device)  # (context,)
    ends = _ends_of(words.generation_prompt, symbols, real, real.long().cumsum(-1))  # (batch, context)
    turned = (symbols[..., None] == torch.tensor(words.turns, device=symbols.device)).any(-1) & real
    opened = torch.where(ends, index, -1).cummax(-1).values  # (batch, context)
    closed = torch.where(turned, index, -1).cummax(-1).values  # (batch, context)
    found = torch.where((opened >= past) & (closed <= opened) & (index < judged[:, None]), opened - past, -1)
    return found[:, past:]


def last_places(real: torch.Tensor, judged: torch.Tensor, count: int) -> torch.Tensor:
    """The last `count` real tokens up to each judged position, latest first; -1 where there are no more.

    Args: real (batch, context), bool; judged (batch, verdicts). Returns (batch, verdicts, count).
    """
    rank = real.long().cumsum(-1)  # (batch, context), real tokens so far
    index = torch.arange(1, real.shape[1] + 1, device=real.device).expand_as(rank)  # (batch, context), from 1 on
    place = _compact(index, real, rank) - 1  # (batch, 1 + context), of the token with each rank; -1 of rank 0
    back = torch.arange(count, device=real.device)  # (count,)
    wanted = (rank.gather(1, judged)[..., None] - back).clamp_min(0)  # (batch, verdicts, count)
    return place.gather(1, wanted.flatten(1)).unflatten(1, (-1, count))


def _last(flags: torch.Tensor, index: torch.Tensor, otherwise: int = 0) -> torch.Tensor:
    """The last position (batch,) at which flags (batch, context) hold, or `otherwise`."""
    return torch.where(flags, index, otherwise).amax(-1)


def _compact(symbols: torch.Tensor, real: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    """The symbols of the real tokens alone, (batch, 1 + context), the first of them at 1; 0 elsewhere."""
    room = torch.zeros_like(nn.functional.pad(symbols, (1, 0)))  # (batch, 1 + context)
    return room.scatter(1, rank * real, symbols * real)


def _ends_of(pattern: tuple[int, ...], symbols: torch.Tensor, real: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    """(batch, context), bool: does the pattern end at this token? Padding within it does not matter."""
    if not pattern:
        return torch.zeros_like(real)
    compact = nn.functional.pad(_compact(symbols, real, rank), (len(pattern) - 1, 0))
    wanted = torch.tensor(pattern, device=symbols.device)  # (pattern,)
    places = rank[..., None] + torch.arange(len(pattern), device=symbols.device)  # (batch, context, pattern)
    window = compact.gather(1, places.flatten(1)).unflatten(1, (-1, len(pattern)))  # (batch, context, pattern)
    return (window == wanted).all(-1) & real


def _spelled_at_the_end(
    refusal: tuple[int, ...], symbols: torch.Tensor, real: torch.Tensor, rank: torch.Tensor, judged: torch.Tensor
) -> torch.Tensor:
    """How many tokens of the refusal the context ends in, (batch,), counting none up to the judged position."""
    longest = len(refusal) - 1
    if not longest:
        return torch.zeros_like(judged)
    compact = nn.functional.pad(_compact(symbols, real, rank), (longest, 0))  # (batch, longest + 1 + context)
    count = rank[:, -1]  # (batch,)
    offsets = torch.arange(longest, device=symbols.device) + 1  # (longest,)
    tail = compact.gather(1, count[:, None] + offsets)  # (batch, longest), the last tokens
    grid = offsets - 1 - (longest - offsets[:, None])  # (longest, longest): place in the refusal, if i + 1 are spelled
    wanted = torch.tensor(refusal, device=symbols.device)[grid.clamp_min(0)]
    match = ((tail[:, None, :] == wanted) | (grid < 0)).all(-1)  # (batch, longest)
    match = match & (offsets <= (count - rank.gather(1, judged[:, None])[:, 0])[:, None])
    return (match * offsets).amax(-1)


def real_tokens(attention_mask: Any, past: int, tokens: int, like: torch.Tensor) -> torch.Tensor:
    """Which of the fed tokens are no padding: (batch, tokens), bool.

    The mask is (batch, past + tokens), or (batch, 1, tokens, keys) as static caches get it, one a type of layer.
    """
    return _seen(attention_mask, past + tokens, like)[:, past:]


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


def last_real(attention_mask: Any, tokens: int, like: torch.Tensor) -> torch.Tensor:
    """The position of each row's last real token of a whole prompt, (batch,), under any padding."""
    real = real_tokens(attention_mask, 0, tokens, like)  # (batch, tokens)
    return _last(real, torch.arange(tokens, device=real.device))


# ----------------------------------------------------------------------------------- watching the main lane


@dataclass
class Recording:
    """What the main lane showed of its blocks during one forward pass."""

    dry: bool = False  # blocks pass their input through: only what the decoder hands to them is wanted
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)  # module path -> (batch, tokens, hidden)
    arguments: dict[str, tuple[tuple, dict]] = field(default_factory=dict)  # module path -> args, kwargs
    position_ids: torch.Tensor | None = None  # as the decoder got them
    lane: "LiveLane | None" = None  # runs along with the main lane, where every token is judged


_recording: contextvars.ContextVar[Recording | None] = contextvars.ContextVar("recording", default=None)


@functools.cache
def _watched(cls: type) -> type:
    """A module class whose instances show to the current Recording what they are called with and put out.

    It keeps the class's name, by which device maps and parallel plans know it.
    """

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        recording = _recording.get()
        if recording is None:  # the second lane runs the same blocks: nothing to see then
            return cls.__call__(self, *args, **kwargs)
        path, role = self._sasa_watched
        if role == "decoder":
            recording.position_ids = kwargs.get("position_ids")
            return cls.__call__(self, *args, **kwargs)
        recording.arguments[path] = (args, kwargs)
        if recording.dry:
            return args[0] if args else kwargs["hidden_states"]
        lane = recording.lane
        if lane is not None and lane.state is not None and path in lane.paths:
            return lane.along(functools.partial(cls.__call__, self), path, args, kwargs)
        output = cls.__call__(self, *args, **kwargs)
        if role == "tapped":
            recording.outputs[path] = output[0] if isinstance(output, tuple) else output
            if lane is not None and path == lane.semantic:
                lane.start(recording)
        return output

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__, "__doc__": cls.__doc__})


@dataclass
class _Watch:
    """Undoes the watching of one module."""

    module: nn.Module

    def remove(self) -> None:
        self.module.__class__ = type(self.module).__mro__[1]
        del self.module._sasa_watched


def watch(model: nn.Module, graph: list[dict[str, Any]]) -> list[_Watch]:
    """Watch the decoder and its blocks. Returns what removes the watching again."""
    tapped = {node["module"] for node in graph if node["op"] == "tap"}
    blocks = [node["module"] for node in graph if node["op"] == "block"]
    roles = {path: "tapped" if path in tapped else "block" for path in blocks}
    roles[blocks[0].rsplit(".", 2)[0]] = "decoder"
    watches = []
    for path, role in roles.items():
        module = model.get_submodule(path)
        module._sasa_watched = (path, role)  # type: ignore[assignment]
        module.__class__ = _watched(type(module))
        watches.append(_Watch(module))
    return watches


@contextlib.contextmanager
def recording(*, dry: bool = False, lane: "LiveLane | None" = None) -> Iterator[Recording]:
    """Within this context, watched modules leave their outputs and arguments in the Recording."""
    seen = Recording(dry, lane=lane)
    token = _recording.set(seen)
    try:
        yield seen
    finally:
        _recording.reset(token)


# ------------------------------------------------------------------------------------- executing the graph


CACHES = ("past_key_values", "past_key_value", "layer_past")


def _replay(module: nn.Module, state: torch.Tensor, seen: tuple[tuple, dict], cache: Any = None) -> torch.Tensor:
    """Run a block on another state with the arguments of the main lane, on another cache than the main lane's."""
    args, kwargs = seen
    kwargs = dict(kwargs)
    for name in CACHES:
        if name in kwargs:
            kwargs[name] = cache
    if "use_cache" in kwargs:
        kwargs["use_cache"] = cache is not None
    mask = kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 4:
        if cache is None:  # a static cache's mask spans its whole length
            kwargs["attention_mask"] = mask[..., : state.shape[1]]
    elif mask is not None and not isinstance(mask, torch.Tensor):
        raise NotImplementedError(
            f"the second lane cannot replay an attention mask of type {type(mask).__name__}. "
            "Load the model with attn_implementation='sdpa' or 'eager'."
        )
    if args:
        output = module(state, *args[1:], **kwargs)
    else:
        kwargs["hidden_states"] = state
        output = module(**kwargs)
    return output[0] if isinstance(output, tuple) else output  # (batch, tokens, hidden)


def project_taps(graph: list[dict[str, Any]], seen: Recording) -> torch.Tensor:
    """The projection of the tokens that the main lane just ran on: (batch, tokens, hidden).

    Several pairs of layers have theirs side by side: (batch, tokens, pairs * hidden). Without projection it is the
    output of the last block, which the probe then reads.
    """
    outputs = {node["name"]: seen.outputs[node["module"]] for node in graph if node["op"] == "tap"}
    found = []
    for node in _entries(graph):
        if node["op"] == "tap":
            return outputs[node["name"]]
        safety, semantic = (outputs[name] for name in node["inputs"])
        found.append(project(safety.to(semantic.device), semantic, node["epsilon"]))
    return found[0] if len(found) == 1 else torch.cat([one.to(found[0].device) for one in found], dim=-1)


def run_lane(
    model: nn.Module,
    graph: list[dict[str, Any]],
    projection: torch.Tensor,
    arguments: dict[str, tuple[tuple, dict]],
    judged: torch.Tensor,
    real: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Execute the nodes of the second lane, or of several, and the probe.

    Args:
        graph: `config.sasa["graph"]`; nodes of other operations are passed over.
        projection: (batch, tokens, hidden), of the whole context; of several pairs side by side.
        arguments: what the decoder hands to each block over the whole context.
        judged: (batch,), the position whose state the probe reads, or the last of those whose mean it reads.
        real: (batch, tokens), bool, False at padding.

    Returns the value of each node by its name.
    """
    names = [node["name"] for node in _entries(graph)]
    parts = projection.chunk(len(names), dim=-1) if len(names) > 1 else (projection,)  # (batch, tokens, hidden) each
    values = dict(zip(names, parts, strict=True))
    for node in graph:
        if node["op"] == "lane_block":
            path = node["module"]
            values[node["name"]] = _replay(model.get_submodule(path), values[node["inputs"][0]], arguments[path])
    return run_probe_at(model, graph, values, judged, real) | values


def _entries(graph: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The nodes that second lanes start from: projections; without any, the tap that the probe reads."""
    return [node for node in graph if node["op"] == "projection"] or [node for node in graph if node["op"] == "tap"]


def graph_ends(graph: list[dict[str, Any]]) -> list[str]:
    """The name of each second lane's last block, or of the main lane's tap where there is no second lane."""
    return [str(node["inputs"][0]) for node in graph if node["op"] == "lane_norm"]


def run_probe_at(
    model: nn.Module,
    graph: list[dict[str, Any]],
    values: dict[str, torch.Tensor],
    judged: torch.Tensor,
    real: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Execute what follows the last block of each second lane, for verdicts at some positions.

    Args:
        values: those of the lanes' blocks over the whole context, (batch, context, hidden), by name.
        judged: (batch,) or (batch, verdicts); real: (batch, context), bool.

    Returns the value of each node by its name; that of the probe has the shape of `judged`.
    """
    count, places = positions_read(graph), None
    if count > 1:
        places = last_places(real, judged if judged.dim() > 1 else judged[:, None], count)  # (batch, verdicts, count)
    read = {}
    for name in graph_ends(graph):
        state = values[name]  # (batch, context, hidden)
        rows = torch.arange(state.shape[0], device=state.device)  # (batch,)
        rows = rows if judged.dim() == 1 and places is None else rows[:, None]
        at = judged if places is None else places.clamp_min(0).flatten(1)
        read[name] = state[rows, at.to(state.device)]  # (*judged, hidden), or (batch, verdicts * count, hidden)
    return run_probe(model, graph, read, places if places is None or judged.dim() > 1 else places[:, 0])


def positions_read(graph: list[dict[str, Any]]) -> int:
    """Over how many of the last positions the probe reads a mean."""
    return int(max(node.get("positions", 1) for node in graph if node["op"] == "lane_norm"))


def _mean(state: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The mean of states (..., positions, hidden) over the places (..., positions) that are none of -1."""
    found = (places >= 0).unsqueeze(-1).to(state.device)  # (..., positions, 1)
    total = (state.float() * found).sum(-2) / found.sum(-2).clamp_min(1)  # (..., hidden)
    return total.to(state.dtype)


def run_probe(
    model: nn.Module, graph: list[dict[str, Any]], ends: dict[str, torch.Tensor], places: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Execute what follows the last block of each second lane, on its output (..., hidden) at the judged positions.

    With `places` (..., positions), as `last_places` gives them, the states are (batch, all of these positions, hidden),
    and the probe reads a mean.

    Args: ends: the outputs, by the names that `graph_ends` gives.

    Returns the value of each node by its name; that of the probe is P(unsafe), (...).
    """
    values = dict(ends)
    for node in graph:
        operation, inputs = node["op"], node["inputs"]
        if operation == "lane_norm":
            state = values[inputs[0]]
            shaped = state if state.dim() == 3 else state.unsqueeze(1)  # (batch, positions, hidden)
            value = model.get_submodule(node["module"])(shaped).reshape(state.shape)  # (..., hidden)
            if places is not None:
                value = _mean(value.reshape(*places.shape, state.shape[-1]), places)  # (..., hidden)
        elif operation == "lane_head":
            value = model.get_submodule(node["module"])(values[inputs[0]])  # (..., vocabulary)
            if node.get("softcap"):
                value = torch.tanh(value.float() / node["softcap"]) * node["softcap"]
        elif operation == "join":
            first = values[inputs[0]]
            value = torch.cat([values[name].to(first.device) for name in inputs], dim=-1)  # (..., lanes * features)
        elif operation == "probe":
            value = model.get_submodule(node["module"])(values[inputs[0]])  # (...)
        else:
            continue
        values[node["name"]] = value
    return values


def run_graph(
    model: nn.Module, graph: list[dict[str, Any]], seen: Recording, judged: torch.Tensor, real: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Projection, second lane and probe over one whole prompt, right after the main lane ran on it.

    Args:
        seen: the main lane's recording; judged (batch,) and real (batch, tokens): as in `run_lane`.
    """
    return run_lane(model, graph, project_taps(graph, seen), seen.arguments, judged, real)


def context_arguments(
    decoder: Any, projection: torch.Tensor, real: torch.Tensor, columns: torch.Tensor, ledger: Ledger
) -> dict[str, tuple[tuple, dict]]:
    """What the decoder hands to its blocks over a whole context, of which it was fed only the end.

    Args:
        decoder: the model under the head, a picture's place in its masks included.
        projection: (batch, context, hidden), of any lane: (batch, context, lanes * hidden); real: (batch, context);
        columns: (batch, context, columns).
    """
    arguments = {
        "inputs_embeds": projection[..., : ledger.hidden // ledger.lanes],
        "attention_mask": real.long(),
        "position_ids": ledger.positions(columns),
        "use_cache": False,
    }
    if "token_type_ids" in inspect.signature(decoder.forward).parameters:
        arguments["token_type_ids"] = columns[..., PICTURE]
    with recording(dry=True) as seen:
        decoder(**arguments)
    return seen.arguments


# ------------------------------------------------------------------------------------- judging every token


def lane_layers(sasa: dict[str, Any]) -> int:
    """How many cache layers the second lane has of its own, behind the ledger's."""
    return sum(node["op"] == "lane_block" for node in sasa["graph"]) if sasa["gate"] == EVERY_TOKEN else 0


class LiveLane:
    """The second lane beside the main lane, with keys and values of its own: every token's state at each call.

    Blocks s+1..f run for it once the main lane is through block f; from there on both lanes go through each block
    as one batch, so that its weights are read once, until the block that the probe reads.

    Args:
        model: the guarded model; graph: `config.sasa["graph"]`.
        kept: the lane's cache layers of the tokens before this call, from block s+1 on; empty at the start.
    """

    def __init__(self, model: nn.Module, graph: list[dict[str, Any]], kept: list[Any]) -> None:
        self.model, self.graph = model, graph
        self.paths = [node["module"] for node in graph if node["op"] == "lane_block"]
        self.semantic = [node["module"] for node in graph if node["op"] == "tap"][-1]
        # How many blocks run for this lane alone: those up to f.
        self.own = self.paths.index(self.semantic) + 1 if self.semantic in self.paths else len(self.paths)
        self.layers = dict(zip(self.paths, kept, strict=False))
        self.state: torch.Tensor | None = None  # (batch, tokens, hidden)

    def start(self, seen: Recording) -> None:
        """Project the two taps and run the lane through block f."""
        state = project_taps(self.graph, seen)  # (batch, tokens, hidden)
        unseen = _recording.set(None)
        try:
            for path in self.paths[: self.own]:
                cache = next(
                    (seen.arguments[path][1][name] for name in CACHES if seen.arguments[path][1].get(name)), None
                )
                own = None if cache is None else _Keys(self, path, cache, both=False)
                state = _replay(self.model.get_submodule(path), state, seen.arguments[path], own)
        finally:
            _recording.reset(unseen)
        self.state = state

    def along(self, run: Callable, path: str, args: tuple, kwargs: dict) -> Any:
        """Run a block on both lanes; returns the main lane's output (batch, tokens, hidden)."""
        hidden = args[0] if args else kwargs["hidden_states"]  # (batch, tokens, hidden)
        assert self.state is not None
        both = torch.cat([hidden, self.state.to(hidden)])  # (2 * batch, tokens, hidden)
        args = (both, *(_twice(value, hidden.shape[0]) for value in args[1:])) if args else ()
        twice = {name: _twice(value, hidden.shape[0]) for name, value in kwargs.items()}
        if not args:
            twice["hidden_states"] = both
        for name in CACHES:
            if kwargs.get(name) is not None:
                twice[name] = _Keys(self, path, kwargs[name], both=True)
        output = run(*args, **twice)
        main, self.state = _halves(output[0] if isinstance(output, tuple) else output)
        return (main, *output[1:]) if isinstance(output, tuple) else main


class _Keys:
    """Stands for the cache within one block: the lane's own keys and values, behind those of the main lane if both."""

    def __init__(self, lane: LiveLane, path: str, cache: Cache, *, both: bool) -> None:
        self.lane, self.path, self.cache, self.both = lane, path, cache, both

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def update(self, keys: torch.Tensor, values: torch.Tensor, index: int, *args: Any, **kwargs: Any) -> Any:
        first: tuple = ()
        if self.both:
            (main_keys, keys), (main_values, values) = _halves(keys), _halves(values)
            first = self.cache.update(main_keys, main_values, index, *args, **kwargs)
        if self.path not in self.lane.layers:
            self.lane.layers[self.path] = _emptied(self.cache.layers[index])
        own = self.lane.layers[self.path].update(keys, values, *args, **kwargs)
        return tuple(torch.cat(pair) for pair in zip(first, own, strict=True)) if self.both else own


def _emptied(layer: Any) -> Any:
    """A cache layer of the same kind, with nothing in it."""
    twin = copy.copy(layer)
    twin.keys = twin.values = None
    twin.is_initialized = False
    for name, value in vars(layer).items():  # lengths that layers count in place must not be shared
        if isinstance(value, torch.Tensor) and name not in ("keys", "values"):
            setattr(twin, name, value.clone())
    twin.reset()
    return twin


def _halves(both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The main lane's rows and the second lane's."""
    batch = both.shape[0] // 2
    return both[:batch], both[batch:]


def _twice(value: Any, batch: int) -> Any:
    """An argument of a block, for two lanes: whatever has a row for each of the batch gets them twice."""
    if isinstance(value, torch.Tensor):
        return torch.cat([value, value]) if value.dim() > 1 and value.shape[0] == batch else value
    if isinstance(value, (tuple, list)):
        return type(value)(_twice(item, batch) for item in value)
    return {name: _twice(item, batch) for name, item in value.items()} if isinstance(value, dict) else value


# ----------------------------------------------------------------------------------------------- the model


class Probe(nn.Module):
    """The linear probe: weight (features,) and bias (), float32 whatever the model is cast to."""

    def __init__(self, features: int) -> None:
        super().__init__()
        unset = float("nan")  # a probe that was never loaded must not pass for one
        self.weight = nn.Parameter(torch.full((features,), unset, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.full((), unset, dtype=torch.float32), requires_grad=False)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """P(unsafe), (...), of the lane's state (..., features)."""
        return unsafe_probability(state, self.weight.to(state.device), self.bias.to(state.device))

    def _apply(self, fn: Callable, recurse: bool = True) -> "Probe":
        before = {name: tensor.data for name, tensor in self.named_parameters()}
        super()._apply(fn, recurse)
        for name, tensor in self.named_parameters():
            if tensor.dtype != torch.float32:  # model.half() and the like move the probe, but do not round it
                tensor.data = before[name].to(tensor.device)
        return self

    def check(self) -> None:
        if self.weight.is_meta:  # offloaded: nothing to look at here
            return
        if not (torch.isfinite(self.weight).all() and torch.isfinite(self.bias)):
            raise ValueError(f"sasa.probe holds NaN or infinity, so the gate cannot judge. {HOW_TO_LOAD}")
        if not self.weight.any():
            raise ValueError(f"sasa.probe.weight is all zero, so the gate cannot judge. {HOW_TO_LOAD}")


def check_settings(sasa: Any) -> dict[str, Any]:
    """Return config.sasa, or raise ValueError where the gate could not run on it."""
    try:
        return _checked(sasa)
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"config.sasa is damaged ({type(error).__name__}: {error}). {HOW_TO_LOAD}") from None


def _checked(sasa: Any) -> dict[str, Any]:
    needed = (
        "format",
        "safety_layer",
        "semantic_layer",
        "epsilon",
        "threshold",
        "refusal_token_ids",
        "generation_prompt_ids",
        "turn_token_ids",
        "gate",
        "graph",
    )
    if not isinstance(sasa, dict) or any(name not in sasa for name in needed):
        raise ValueError(f"config.json has no complete `sasa` entry, so there is no gate. {HOW_TO_LOAD}")
    if sasa["format"] != FORMAT:
        raise ValueError(f"config.sasa has format {sasa['format']}, this file reads {FORMAT}. {HOW_TO_LOAD}")
    if not all(0 <= safety < semantic for safety, semantic in _pairs(sasa)):
        raise ValueError(f"config.sasa needs 0 <= safety_layer < semantic_layer. {HOW_TO_LOAD}")
    if not 0.0 < sasa["threshold"] < 1.0 or not sasa["refusal_token_ids"]:
        raise ValueError(f"config.sasa has no usable threshold or refusal. {HOW_TO_LOAD}")
    if sasa["gate"] not in (PROMPT, EVERY_TOKEN):
        raise ValueError(f"config.sasa's gate is {sasa['gate']!r}, which nothing here runs. {HOW_TO_LOAD}")
    if not _is_sasa(sasa["graph"], sasa):
        raise ValueError(f"config.sasa's graph is not that of its layers, from tap to gate. {HOW_TO_LOAD}")
    return sasa


def _is_sasa(graph: list[dict[str, Any]], sasa: dict[str, Any]) -> bool:
    """Is this graph the main lane, and behind it exactly the chain that the layers of `sasa` call for?"""
    main: dict[Any, Any] = {node.get("index"): node for node in graph if node["op"] == "block"}
    if sorted(main) != list(range(len(main))):
        return False
    positions, pairs = sasa.get("probe_positions", 1), _pairs(sasa)
    last = len(main) - 1 if sasa.get("probe_block") is None else sasa["probe_block"]
    if any(not (safety < semantic < len(main) and safety <= last < len(main)) for safety, semantic in pairs):
        return False
    if positions != int(positions) or positions < 1:
        return False
    if sasa["gate"] == EVERY_TOKEN and (positions > 1 or len(pairs) > 1):
        return False
    chain = [node for node in graph if node["op"] in LANE]
    places = {node["name"]: place for place, node in enumerate(chain)}
    # The main lane's nodes that the chain reads are known by their modules, its own by their places.
    found = [
        (node["op"], _module_of(node), [places[name] for name in node["inputs"] if name in places]) for node in chain
    ]
    settings = {"positions": positions, "epsilon": sasa["epsilon"]}
    kept = all(node.get(name, 1) == value for node in chain for name, value in settings.items() if _has(node, name))
    return found == _wanted(main, pairs, last, logits=sasa.get("probe_space") == "logits") and kept


def _pairs(sasa: dict[str, Any]) -> list[tuple[int, int]]:
    """All pairs of safety and semantic layer; none where the probe reads the main lane."""
    first = sasa["safety_layer"], sasa["semantic_layer"]
    further = [(safety, semantic) for safety, semantic in sasa.get("further_pairs", [])]
    return further if first == (None, None) else [first, *further]


def _module_of(node: dict[str, Any]) -> Any:
    return node.get("module") if node["op"] in ("tap", "lane_block") else None


def _has(node: dict[str, Any], name: str) -> bool:
    return node["op"] == {"positions": "lane_norm", "epsilon": "projection"}[name]


def _wanted(main: dict[Any, Any], pairs: list[tuple[int, int]], last: int, *, logits: bool) -> list[tuple]:
    """What SASA adds to a graph: operation, block's module, and which of the steps before it each step reads."""
    steps: list[tuple] = []

    def add(operation: str, inputs: list[int], block: int | None = None) -> int:
        steps.append((operation, None if block is None else main[block]["module"], inputs))
        return len(steps) - 1

    if not pairs:
        ends = [add("tap", [], len(main) - 1)]
    else:
        taps = [[add("tap", [], block) for block in pair] for pair in pairs]
        ends = [add("projection", pair) for pair in taps]
        for number, (safety, _) in enumerate(pairs):
            for block in range(safety + 1, last + 1):
                ends[number] = add("lane_block", [ends[number]], block)
    ends = [add("lane_norm", [end]) for end in ends]
    if logits:
        ends = [add("lane_head", [end]) for end in ends]
    if len(ends) > 1:
        ends = [add("join", ends)]
    add("gate", [add("probe", ends)])
    return steps


def fingerprint(sasa: dict[str, Any]) -> str:
    """SHA-256 over all settings but itself, so that an edited entry is seen when it is loaded."""
    kept = {key: value for key, value in sasa.items() if key != "sha256"}
    text = json.dumps(kept, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class GuardedConfig:
    """Mixed into a family's configuration: it opens the seal on which the stock configuration breaks.

    The sealed `id2label` of each nested configuration carries the message; a stock class cannot read it, so
    it can never load the weights without the gate.
    """

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        config_dict = {key: _opened(value) for key, value in config_dict.items()}
        config_dict = {key: value for key, value in config_dict.items() if value != {}}
        sasa = check_settings(config_dict.get("sasa"))
        if sasa.get("sha256") != fingerprint(sasa):
            raise ValueError(
                "config.sasa was edited since it was written, so the gate may not be what was verified. "
                "Export the model again with the settings that you want; --probe keeps its probe."
            )
        return super().from_dict(config_dict, **kwargs)

    def to_json_string(self, *args: Any, **kwargs: Any) -> str:
        written = json.loads(super().to_json_string(*args, **kwargs))
        if isinstance(written.get("sasa"), dict):
            written["sasa"]["sha256"] = fingerprint(written["sasa"])
        return json.dumps(sealed(written), indent=2, sort_keys=True) + "\n"


def sealed(config_dict: dict[str, Any]) -> dict[str, Any]:
    """Seal the nested configurations of a config.json, so that stock classes refuse it.

    They lose their architectures, by which a converter would take the decoder for a plain one.
    """
    out = dict(config_dict)
    for name in ("text_config", "vision_config"):
        nested = {key: value for key, value in out.get(name, {}).items() if key != "architectures"}
        out[name] = {**nested, "id2label": {SEAL: 0}}
    return out


def _opened(value: Any) -> Any:
    if isinstance(value, dict) and SEAL in (value.get("id2label") or {}):
        return {key: item for key, item in value.items() if key != "id2label"}
    return value


class GuardedModel:
    """Mixed into a family's ...ForConditionalGeneration: judges each prompt, then lets it answer or refuses."""

    _keep_in_fp32_modules_strict = ("sasa",)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if GuardedModel not in cls.__bases__:  # a subclass of a guarded class inherits its gate
            return
        family = cls.__bases__[cls.__bases__.index(GuardedModel) + 1]  # the stock class
        cls.forward = _guarded(family.forward)
        if not hasattr(family.__init__, "sealed_by_sasa"):
            family.__init__ = _sealed(family.__init__)
        stock, own = family.config_class.model_type, cls.config_class.model_type
        mapping = get_checkpoint_conversion_mapping(family.__name__) or get_checkpoint_conversion_mapping(stock)
        if mapping is not None:  # old names in the shards are renamed as for the stock class
            register_checkpoint_conversion_mapping(own, mapping, overwrite=True)

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        text = config.get_text_config(decoder=True)
        settings = check_settings(getattr(config, "sasa", None))
        if sum(node["op"] == "block" for node in settings["graph"]) != text.num_hidden_layers:
            raise ValueError(f"config.sasa's graph has not as many blocks as the decoder. {HOW_TO_LOAD}")
        if not all(0 <= token < text.vocab_size for token in settings["refusal_token_ids"]):
            raise ValueError(f"config.sasa's refusal has tokens outside the vocabulary. {HOW_TO_LOAD}")
        features = text.vocab_size if settings.get("probe_space") == "logits" else text.hidden_size
        features *= len(_entries(settings["graph"]))
        self.sasa = nn.Module()
        self.sasa.probe = Probe(features)
        watch(self, settings["graph"])
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info.get(problem):
                names = sorted(str(name) for name in info[problem])
                raise ValueError(
                    f"{problem.replace('_', ' ')} in the guarded model: {', '.join(names[:5])}"
                    f"{' ...' if len(names) > 5 else ''} ({len(names)} in all). {HOW_TO_LOAD}"
                )
        model.sasa.probe.check()
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)
        owner = next(cls for cls in type(self).__mro__ if GuardedModel in cls.__bases__)
        spec = sys.modules[owner.__module__].__spec__
        Path(save_directory, "modeling_sasa.py").write_text(spec.loader.get_source(spec.name), encoding="utf-8")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        given = [value for value in (*args, kwargs.get("generation_config")) if isinstance(value, GenerationConfig)]
        settings = {**vars(given[0] if given else self.generation_config), **kwargs}
        if settings.get("assistant_early_exit"):
            raise NotImplementedError("assistant_early_exit leaves out the blocks that judge. Run without it.")
        if settings.get("assistant_ensemble_weight") is not None:
            raise NotImplementedError(
                "assistant_ensemble_weight mixes the words of an unguarded model into the answer. Run without it."
            )
        if settings.get("guidance_scale") not in (None, 1, 1.0):
            raise NotImplementedError(
                "guidance_scale mixes in the answer to a second, negative prompt, which may be refused apart from the "
                "first. Run without it."
            )
        if self.training and self.is_gradient_checkpointing and settings.get("use_cache") is not False:
            raise NotImplementedError("gradient checkpointing keeps no cache to generate with. Call eval() first.")
        if settings.get("is_assistant"):
            raise NotImplementedError(
                "a guarded model does not guard the model that it drafts for. Take the guarded model as the main one, "
                "and an unguarded one as the assistant."
            )
        if "paged" in str(settings.get("cache_implementation")):
            raise NotImplementedError(f"cache_implementation='paged': {PACKED}")
        return super().generate(*args, **kwargs)

    @classmethod
    def is_backend_compatible(cls) -> bool:
        """Serving engines that run the decoder under a head of their own ask this: they would lose the gate."""
        return False

    def _no_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"continuous batching: {PACKED}")

    generate_batch = init_continuous_batching = continuous_batching_context_manager = _no_continuous_batching

    def _sample(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with _generating(input_ids, kwargs):
            return super()._sample(input_ids, *args, **kwargs)

    def _beam_search(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with _generating(input_ids, kwargs):
            return super()._beam_search(input_ids, *args, **kwargs)

    def _assisted_decoding(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with _generating(input_ids, kwargs):
            return super()._assisted_decoding(input_ids, *args, **kwargs)

    def _sasa_forward(self, forward: Callable, kwargs: dict[str, Any]) -> Any:
        as_dictionary = kwargs.pop("return_dict", None)
        if as_dictionary is None:
            as_dictionary = self.config.return_dict
        ids, embeddings = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        fed = ids if ids is not None else embeddings  # (batch, tokens[, hidden])
        if fed is None:
            return forward(self, **kwargs)  # the family's own error says what is missing
        if "paged" in str(self.config._attn_implementation) or kwargs.get("cu_seq_lens_q") is not None:
            raise NotImplementedError(f"packed prompts: {PACKED}")
        sasa = self.config.sasa
        ledger, words = Ledger.of(self.config.get_text_config(decoder=True), sasa), Words.of(sasa)
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        kept, lane_layers = self._kept(cache, past, ledger)
        generation = _generation.get()
        own, prompt_end = generation is not None, None
        if generation is not None and generation.cache is cache:
            prompt_end = generation.prompt_end
        shown = ledger.unpack(kept, REAL, REAL + 1)[..., 0] > 0.5 if kept else fed.new_zeros((len(fed), 0)).bool()
        check_mask(kwargs.get("attention_mask"), shown, fed.shape[1], fed, own=own)
        known = None if ids is not None else self.get_input_embeddings()(_on(words.table, fed))
        symbols = words.in_ids(ids) if known is None else words.in_embeddings(embeddings, known)  # (batch, tokens)
        last = ledger.unpack_columns([tensor[:, :, -1:] for tensor in kept])[:, 0] if kept else None  # (batch, columns)
        is_answer = sasa["gate"] == PROMPT and fed.shape[1] == 1 and (prompt_end is None or past >= prompt_end)
        is_answer = is_answer and last is not None and bool(goes_on(last, symbols, words).all())

        lane = LiveLane(self, sasa["graph"], lane_layers) if sasa["gate"] == EVERY_TOKEN else None
        with recording(lane=lane) as seen:
            output = forward(self, **kwargs, return_dict=True)
        columns = read_columns(kwargs, past, fed, symbols, seen.position_ids, ledger)
        before = torch.zeros_like(columns[:, 0, STATE]) if last is None else last[:, STATE]  # (batch,)
        projection = project_taps(sasa["graph"], seen)  # (batch, tokens, hidden)
        real = columns[..., REAL] > 0  # (batch, tokens)
        covered, nothing = torch.ones_like(real), torch.zeros_like(real[:, :1])
        probability, states = None, states_going_on(before, real, words)  # (batch, tokens)
        if not is_answer:
            context = torch.cat([ledger.unpack_columns(kept), columns], dim=1) if kept else columns
            turn = read_turn(
                context[..., SYMBOL], context[..., REAL] > 0, past, past == 0 or fed.shape[1] > 1, before,
                context[..., JUDGED] > 0, words, prompt_end,
            )  # fmt: skip
            if lane is None:
                probability, states = self._judge(turn, projection, kept, seen, context, ledger)
            else:
                probability, states = self._judge_all(turn, lane, past)
            # A row of padding alone has no prompt to judge, and attention over no key is attention over all.
            covered, nothing = turn.covered, turn.rank[:, -1:] == 0
        states = torch.where(is_sound(projection, real), states, states.clamp_min(1))  # (batch, tokens)

        columns[..., STATE], columns[..., JUDGED] = states, covered
        if output.past_key_values is not None and output.past_key_values.get_seq_length():
            self._keep(output.past_key_values, ledger, columns, projection, lane)
        said = torch.where(nothing, states.clamp_min(1), states)  # (batch, tokens)
        output.logits = self._gate(output.logits, said, kwargs.get("logits_to_keep", 0))
        output["unsafe_probability"] = probability
        return output if as_dictionary else output.to_tuple()

    def _judge(
        self,
        turn: Turn,
        projection: torch.Tensor,
        kept: list[torch.Tensor],
        seen: Recording,
        context: torch.Tensor,
        ledger: Ledger,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """P(unsafe) where a verdict on a prompt is due, (batch,), NaN in other rows, and STATE (batch, tokens)."""
        if not turn.due.any():
            return None, turn.other_states
        whole, arguments = projection, seen.arguments  # (batch, context, hidden)
        real = context[..., REAL] > 0  # (batch, context)
        if kept:
            whole = torch.cat([ledger.unpack_projection(kept).to(projection), projection], dim=1)
            arguments = context_arguments(self.model, whole, real, context, ledger)
        graph, words = self.config.sasa["graph"], Words.of(self.config.sasa)
        values = run_lane(self, graph, whole, arguments, turn.judged, real)
        probability = self._read(values)  # (batch,)
        states = turn.states(self._unsafe(probability).to(turn.due.device))
        past = context.shape[1] - projection.shape[1]
        earlier = earlier_answers(context[..., SYMBOL], real, past, turn.judged, words)
        if (earlier >= 0).any():  # a conversation in one call: the logits of its earlier answers are judged too
            fed = torch.arange(past, context.shape[1], device=real.device).expand_as(earlier)  # (batch, tokens)
            found = self._read(run_probe_at(self, graph, values, fed, real))  # (batch, tokens)
            unsafe = self._unsafe(found).to(earlier.device)  # (batch, tokens)
            states = torch.where((earlier >= 0) & unsafe.gather(1, earlier.clamp_min(0)), 1, states)
        return probability.masked_fill(~turn.due.to(probability.device), float("nan")), states

    def _judge_all(self, turn: Turn, lane: LiveLane, past: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The largest P(unsafe) among the positions that this call judges, (batch,), and STATE (batch, tokens)."""
        graph = self.config.sasa["graph"]
        ends = dict.fromkeys(graph_ends(graph), lane.state)
        found = self._read(run_probe(self, graph, ends)).to(turn.due.device)  # (batch, tokens)
        unsafe = self._unsafe(found)  # (batch, tokens)
        turn = replace(turn, due=turn.due & (turn.judged >= past))  # earlier tokens had theirs
        place = (turn.judged - past).clamp_min(0)[:, None]  # (batch, 1)
        states = turn.states(unsafe.gather(1, place)[:, 0])
        states = turn.late_states(states, unsafe, len(self.config.sasa["refusal_token_ids"]))
        here = torch.zeros_like(unsafe).scatter(1, place, turn.due[:, None]) | turn.answer  # (batch, tokens)
        largest = found.masked_fill(~here, -1.0).amax(-1)  # (batch,); NaN stays NaN
        return largest.masked_fill(~here.any(-1), float("nan")), states

    def _read(self, values: dict[str, torch.Tensor]) -> torch.Tensor:
        """P(unsafe), (...), among the values of the graph."""
        return next(values[node["name"]] for node in self.config.sasa["graph"] if node["op"] == "probe")

    def _unsafe(self, probability: torch.Tensor) -> torch.Tensor:
        """The verdicts, (...), bool; NaN is unsafe."""
        return ~(probability < self.config.sasa["threshold"])

    def _gate(self, logits: torch.Tensor, states: torch.Tensor, keep: Any) -> torch.Tensor:
        """The logits (batch, kept, vocabulary), forced where STATE (batch, tokens) says so."""
        refusal = tuple(self.config.sasa["refusal_token_ids"])
        kept = torch.arange(states.shape[1], device=states.device)  # (kept,)
        kept = kept[keep.to(kept.device)] if isinstance(keep, torch.Tensor) else kept[-keep:] if keep else kept
        states = states[:, kept].to(logits.device)  # (batch, kept)
        due = _on(refusal, logits)[(states - 1).clamp_min(0)]  # (batch, kept)
        return gate(logits, due, states > 0, refusal)

    def _keep(
        self, cache: Cache, ledger: Ledger, columns: torch.Tensor, projection: torch.Tensor, lane: LiveLane | None
    ) -> None:
        """Write the fed tokens into the ledger, and put the lane's own cache layers behind it."""
        first = cache.layers[0]
        if len(cache.layers) == ledger.first:
            static = isinstance(first, StaticLayer)
            length = max(layer.get_max_length() for layer in cache.layers)
            cache.layers.extend(StaticLayer(length) if static else DynamicLayer() for _ in range(ledger.layers))
        packed = ledger.pack(columns.to(projection.device), projection[..., : ledger.hidden], first.dtype)
        for index in range(ledger.layers):
            cache.update(packed[2 * index], packed[2 * index + 1], ledger.first + index)
        if lane is not None and len(cache.layers) == ledger.first + ledger.layers:
            cache.layers.extend(lane.layers[path] for path in lane.paths)

    def _kept(self, cache: Cache | None, past: int, ledger: Ledger) -> tuple[list[torch.Tensor], list[Any]]:
        """What the cache holds of the tokens before this call; nothing where there are none.

        Returns the ledger, tensors (batch, heads, past, size), and the lane's own cache layers.
        """
        if cache is None or past == 0:
            return [], []
        end, sasa = ledger.first + ledger.layers, self.config.sasa
        own = lane_layers(sasa)
        layers = cache.layers[ledger.first :]
        if len(cache.layers) != end + own or any(int(layer.get_seq_length()) != past for layer in layers):
            raise ValueError(
                "past_key_values holds tokens that this guarded model has not judged. Start from the whole prompt "
                "without past_key_values."
            )
        kept = [
            tensor[:, :, :past] for layer in cache.layers[ledger.first : end] for tensor in (layer.keys, layer.values)
        ]
        return kept, cache.layers[end:]


@dataclass(frozen=True)
class _Generation:
    """What a decoding loop of transformers is at."""

    cache: Cache | None
    prompt_end: int


_generation: contextvars.ContextVar[_Generation | None] = contextvars.ContextVar("generation", default=None)


@contextlib.contextmanager
def _generating(input_ids: torch.Tensor, kwargs: dict[str, Any]) -> Iterator[None]:
    """Within this context, a decoding loop feeds its prompt and then its answer, to one cache."""
    given = (input_ids, kwargs.get("attention_mask"), kwargs.get("inputs_embeds"))
    end = max(value.shape[1] for value in given if isinstance(value, torch.Tensor) and value.dim() > 1)
    token = _generation.set(_Generation(kwargs.get("past_key_values"), end))
    try:
        yield
    finally:
        _generation.reset(token)


def read_columns(
    kwargs: dict[str, Any],
    past: int,
    fed: torch.Tensor,
    symbols: torch.Tensor,
    position_ids: torch.Tensor | None,
    ledger: Ledger,
) -> torch.Tensor:
    """The ledger's columns of the fed tokens, (batch, tokens, columns), int64; STATE and JUDGED are still 0.

    Args:
        kwargs: of the model's forward; fed: the ids or embeddings among them.
        symbols: (batch, tokens); position_ids: as the decoder got them, with one axis or several.
    """
    batch, tokens = fed.shape[:2]
    real = real_tokens(kwargs.get("attention_mask"), past, tokens, fed)  # (batch, tokens)
    picture = kwargs.get("token_type_ids")
    picture = torch.zeros_like(symbols) if picture is None else picture[:, -tokens:].to(symbols)  # (batch, tokens)
    if position_ids is None:
        position_ids = torch.arange(past, past + tokens, device=fed.device)[None]  # (1, tokens)
    if position_ids.dim() == 2:
        position_ids = position_ids[None]  # (1, batch, tokens)
    positions = position_ids[-ledger.axes :].expand(ledger.axes, batch, tokens).clamp_min(0)
    unset = torch.zeros_like(symbols)
    parts = [unset, symbols, real.to(symbols), picture, unset]
    return torch.cat([torch.stack(parts, dim=-1), ledger.digits(positions).to(symbols)], dim=-1)


def _on(tokens: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(tokens, device=like.device)


def _sealed(init: Callable) -> Callable:
    """The stock class's `__init__`, which refuses a guarded configuration that it is handed already opened."""

    @functools.wraps(init)
    def sealed_init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if hasattr(config, "sasa") and not hasattr(type(self), "_sasa_forward"):
            raise ValueError(SEAL)
        init(self, config, *args, **kwargs)

    sealed_init.sealed_by_sasa = True
    return sealed_init


def _guarded(forward: Callable) -> Callable:
    """The family's forward with the gate around it; generate() still reads the family's own signature."""
    names = list(inspect.signature(forward).parameters)[1:]

    @functools.wraps(forward)
    def guarded_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._sasa_forward(forward, dict(zip(names, args, strict=False), **kwargs))

    return guarded_forward
