"""Calling a model by hand, as a server does: pieces of a prompt on one cache, then the answer token by token."""

import copy
from typing import Any

import torch
from onnx_runner import image_token, positions
from torch import Tensor

from matrix.bench import TOKENS, Bench, Inputs, Transcript

PER_TOKEN = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "mm_token_type_ids")


class Loop:
    """A batch of rows on one cache, of a torch model or of graphs. `logits` are the last call's, (rows, vocabulary)."""

    def __init__(self, bench: Bench, model: Any, cache: Any = None) -> None:
        self.bench, self.model, self.cache = bench, model, cache
        self.mask: Tensor | None = None  # (rows, context)
        self.types: Tensor | None = None  # (rows, context), for families that tell pictures from text by it
        self.next = torch.zeros(0)  # (rows, 1) or (axes, rows, 1), the position that comes next

    def feed(self, piece: Inputs) -> "Loop":
        """One call: input_ids (rows, tokens) or inputs_embeds (rows, tokens, hidden), and what belongs to them."""
        fed = piece["inputs_embeds"] if "inputs_embeds" in piece else piece["input_ids"]
        tokens = fed.shape[1]
        mask = piece.get("attention_mask", torch.ones(fed.shape[:2], dtype=torch.int64))  # (rows, tokens)
        if self.mask is None:
            places, self.next = positions(self.bench.guarded, {**piece, "attention_mask": mask})
            self.mask = mask
        else:
            places = self.next + torch.arange(tokens)  # (..., rows, tokens)
            self.next = self.next + tokens
            self.mask = torch.cat([self.mask, mask], dim=1)
        call = {**piece, "attention_mask": self.mask, "position_ids": places, "use_cache": True}
        call.pop("mm_token_type_ids", None)  # the positions say it
        if self.bench.guarded.family == "gemma3":
            types = piece.get("token_type_ids", torch.zeros_like(mask))  # (rows, tokens)
            call["token_type_ids"] = self.types = types if self.types is None else torch.cat([self.types, types], dim=1)
        output = self.model(past_key_values=self.cache, **call)
        self.cache, self.logits = output.past_key_values, output.logits[:, -1]
        return self

    def feed_ids(self, ids: list[int], size: int | None = None) -> "Loop":
        """Tokens of a single row, in pieces of `size` tokens or at once."""
        for piece in torch.tensor([ids]).split(size or len(ids), dim=1):
            self.feed({"input_ids": piece})
        return self

    def feed_prompt(self, inputs: Inputs, size: int | None = None, *, last: int = 0, embedded: bool = False) -> "Loop":
        """A processor's prompt in pieces of `size` tokens, or in two with `last` tokens in the second, or whole.

        Its pictures come with the first piece, which reaches to their end.
        """
        if embedded:
            embeds = self.model.get_input_embeddings()(inputs["input_ids"])  # (rows, tokens, hidden)
            inputs = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
            pictured, tokens = 1, embeds.shape[1]
        else:
            places = (inputs["input_ids"] == image_token(self.bench.guarded)).any(0).nonzero()  # (columns, 1)
            pictured, tokens = int(places.max()) + 1 if len(places) else 1, inputs["input_ids"].shape[1]
        step = size or (tokens - last)
        ends = [*(end for end in range(step, tokens, step) if end >= pictured), tokens]
        for start, end in zip([0, *ends], ends, strict=False):
            piece = {name: value[:, start:end] for name, value in inputs.items() if name in PER_TOKEN}
            self.feed(piece if start else inputs | piece)
        return self

    def say(self, count: int = TOKENS, *, embedded: bool = False, until: set[int] | None = None) -> Tensor:
        """Greedy tokens (rows, up to `count`), each fed as it is said; ends sooner where all rows say one of `until`."""
        said = []
        for _ in range(count):
            said.append(self.logits.argmax(-1, keepdim=True))  # (rows, 1)
            name, fed = "input_ids", said[-1]
            if embedded:
                name, fed = "inputs_embeds", self.model.get_input_embeddings()(fed)  # (rows, 1, hidden)
            self.feed({name: fed})
            if until is not None and until.issuperset(said[-1][:, 0].tolist()):
                break
        return torch.cat(said, dim=1)

    def crop(self, dropped: int) -> "Loop":
        """Forget the last tokens."""
        assert self.mask is not None
        self.cache.crop(-dropped)
        length = self.mask.shape[1] - dropped
        self.mask, self.next = self.mask[:, :length], self.next - dropped
        self.types = None if self.types is None else self.types[:, :length]
        return self

    def pick(self, rows: Tensor) -> "Loop":
        """Keep these rows of the batch, in this order, some perhaps several times."""
        assert self.mask is not None
        self.cache.batch_select_indices(rows)
        self.mask, self.next, self.logits = self.mask[rows], self.next[..., rows, :], self.logits[rows]
        self.types = None if self.types is None else self.types[rows]
        return self

    def copy(self) -> "Loop":
        """Another loop that goes on from here."""
        other = copy.copy(self)
        other.cache = copy.deepcopy(self.cache)
        return other


def converse(bench: Bench, model: Any, size: int | None) -> Transcript:
    """A conversation on a kept cache, its turns fed in pieces of `size` tokens or each at once."""
    loop, history, transcript = Loop(bench, model), list[int](), Transcript()
    for turn in bench.turns:
        added = turn[1:] if history and history[-1] == turn[0] else turn  # the answer may have ended as the turn does
        loop.feed_ids(added, size)
        history = history + added
        said = loop.say(until=bench.guarded.ends)
        transcript.append((history, said))
        history = history + said[0].tolist()
    return transcript
