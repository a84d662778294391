"""A loop that somebody writes for himself: pieces of a prompt are fed to a model on one cache, then its answer."""

from collections.abc import Callable
from typing import Any

import torch
from onnx_runner import positions
from torch import Tensor

from matrix.bench import TOKENS, Bench, Inputs

PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


class ByHand:
    """A batch of rows on one cache.

    `logits` (rows, vocabulary) and `probability` (rows,) or None are those of the last call.
    """

    def __init__(self, bench: Bench, model: Any) -> None:
        self.bench, self.model = bench, model
        self.cache: Any = None
        self.mask: Tensor | None = None  # (rows, context)
        self.types: Tensor | None = None  # (rows, context), 1 where a picture is, for families that ask for it
        self.next: Tensor | None = None  # (rows, 1) or (axes, rows, 1), the position that comes next

    def feed(
        self,
        ids: Tensor | None = None,
        *,
        embeds: Tensor | None = None,
        mask: Tensor | None = None,
        places: Tensor | None = None,
        types: Tensor | None = None,
        **further: Any,
    ) -> "ByHand":
        """One call: ids (rows, tokens) or embeds (rows, tokens, hidden), with pictures and options in `further`."""
        fed = ids if ids is not None else embeds  # (rows, tokens[, hidden])
        assert fed is not None
        rows, tokens = fed.shape[:2]
        mask = torch.ones((rows, tokens), dtype=torch.int64) if mask is None else mask  # (rows, tokens)
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], dim=1)
        if places is None:
            start = self._start(rows)  # (..., rows, 1)
            places = start + torch.arange(tokens)  # (..., rows, tokens)
        self.next = places[..., -1:] + 1
        call = {"attention_mask": self.mask, "position_ids": places, "use_cache": True, **further}
        if self.bench.guarded.family == "gemma3":
            types = torch.zeros_like(mask) if types is None else types  # (rows, tokens)
            self.types = types if self.types is None else torch.cat([self.types, types], dim=1)
            call["token_type_ids"] = self.types
        call["input_ids" if ids is not None else "inputs_embeds"] = fed
        output = self.model(past_key_values=self.cache, **call)
        self.cache = output.past_key_values
        self.logits = output.logits[:, -1]  # (rows, vocabulary)
        self.probability = output.get("unsafe_probability")  # (rows,)
        return self

    def feed_prompt(self, inputs: Inputs, ends: list[int], *, embeds: Tensor | None = None) -> "ByHand":
        """Feed a processor's prompt in pieces that end at `ends`; its pictures come with the first."""
        places, _ = positions(self.bench.guarded, inputs)  # (..., rows, tokens)
        start = 0
        for end in ends:
            piece: dict[str, Any] = {"mask": inputs["attention_mask"][:, start:end], "places": places[..., start:end]}
            if "token_type_ids" in inputs:
                piece["types"] = inputs["token_type_ids"][:, start:end]
            if embeds is None:
                piece["ids"] = inputs["input_ids"][:, start:end]
            else:
                piece["embeds"] = embeds[:, start:end]
            if start == 0:
                piece |= {name: value for name, value in inputs.items() if name not in PER_TOKEN}
            self.feed(**piece)
            start = end
        return self

    def say(self, count: int = TOKENS, *, embedded: bool = False, stop: frozenset[int] = frozenset()) -> Tensor:
        """Greedy tokens (rows, up to count), each fed as it is said; all rows at one of `stop` ends it sooner."""
        said = []
        for _ in range(count):
            token = self.logits.argmax(-1, keepdim=True)  # (rows, 1)
            said.append(token)
            if embedded:
                self.feed(embeds=self.model.get_input_embeddings()(token))
            else:
                self.feed(token)
            if stop.issuperset(token[:, 0].tolist()):
                break
        return torch.cat(said, dim=1)

    def all_logits(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """Feed tokens (rows, tokens) and give the logits of every position, (rows, tokens, vocabulary)."""
        seen: list[Tensor] = []
        handle = self.model.register_forward_hook(lambda module, args, output: seen.append(output.logits))
        try:
            self.feed(input_ids, mask=inputs.get("attention_mask"), types=inputs.get("token_type_ids"))
        finally:
            handle.remove()
        return seen[0]

    def crop(self, length: int) -> "ByHand":
        """Back to the first tokens of the context; pictures must lie before or behind them."""
        assert self.mask is not None
        dropped = self.mask.shape[1] - length
        self.cache.crop(-dropped)
        self.mask = self.mask[:, :length]
        self.types = None if self.types is None else self.types[:, :length]
        assert self.next is not None
        self.next = self.next - dropped
        return self

    def pick(self, rows: Tensor) -> "ByHand":
        """Keep these rows of the batch, in this order, some perhaps several times."""
        assert self.mask is not None and self.next is not None
        self.cache.batch_select_indices(rows)
        self.mask, self.next, self.logits = self.mask[rows], self.next[..., rows, :], self.logits[rows]
        self.types = None if self.types is None else self.types[rows]
        return self

    def _start(self, rows: int) -> Tensor:
        if self.next is not None:
            return self.next
        first = torch.zeros((rows, 1), dtype=torch.int64)  # (rows, 1)
        return first.expand(3, -1, -1) if hasattr(self.bench.stock.model, "get_rope_index") else first


def chunks(tokens: int, size: int, first: int = 1) -> list[int]:
    """Where pieces of `size` tokens end; the first piece has at least `first`."""
    ends = [end for end in range(size, tokens, size) if end >= first]
    return [*ends, tokens]


def last_picture(bench: Bench, inputs: Inputs) -> int:
    """How many tokens reach to the end of the last picture, at least one."""
    config = bench.guarded.model.config
    token = getattr(config, "image_token_id", None) or config.image_token_index
    columns = (inputs["input_ids"] == token).any(dim=0).nonzero()  # (columns, 1)
    return int(columns.max()) + 1 if len(columns) else 1


def fed(bench: Bench, size: int | None = None, *, embedded: bool = False) -> Callable[[Any, Inputs], Tensor]:
    """The way of feeding a prompt by hand in pieces of `size` tokens, or whole, and its answer token by token."""

    def run(model: Any, inputs: Inputs) -> Tensor:
        tokens = inputs["input_ids"].shape[1]
        ends = [tokens] if size is None else chunks(tokens, size, last_picture(bench, inputs))
        embeds = model.get_input_embeddings()(inputs["input_ids"]) if embedded else None  # (rows, tokens, hidden)
        return ByHand(bench, model).feed_prompt(inputs, ends, embeds=embeds).say(embedded=embedded)

    return run


def whole(bench: Bench, model: Any, inputs: Inputs) -> ByHand:
    """A loop that was fed a prompt in one call."""
    return ByHand(bench, model).feed_prompt(inputs, [inputs["input_ids"].shape[1]])
