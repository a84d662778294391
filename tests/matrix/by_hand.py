"""Calling a model by hand, as a server does: pieces of a prompt on one cache, then the answer token by token."""

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
        self.next: Tensor | None = None  # (rows, 1) or (axes, rows, 1), the position that comes next

    def feed(self, piece: Inputs) -> "Loop":
        """One call: input_ids (rows, tokens) or inputs_embeds (rows, tokens, hidden), and what belongs to them."""
        fed = piece["inputs_embeds"] if "inputs_embeds" in piece else piece["input_ids"]
        tokens = fed.shape[1]
        mask = piece.get("attention_mask", torch.ones(fed.shape[:2], dtype=torch.int64))  # (rows, tokens)
        start = self._first(len(fed)) if self.next is None else self.next
        piece = {"position_ids": start + torch.arange(tokens), **piece}  # (..., rows, tokens)
        self.next = torch.maximum(start, piece["position_ids"].amax(-1, keepdim=True) + 1)
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], dim=1)
        call = {**piece, "attention_mask": self.mask, "use_cache": True}
        call.pop("mm_token_type_ids", None)  # the positions say it
        if self.bench.guarded.family == "gemma3":
            types = piece.get("token_type_ids", torch.zeros_like(mask))  # (rows, tokens)
            call["token_type_ids"] = self.types = types if self.types is None else torch.cat([self.types, types], dim=1)
        output = self.model(past_key_values=self.cache, **call)
        self.cache, self.logits = output.past_key_values, output.logits[:, -1]
        return self

    def _first(self, rows: int) -> Tensor:
        """Where positions begin, (rows, 1) or (axes, rows, 1)."""
        axes = (3,) if hasattr(self.bench.stock.model, "get_rope_index") else ()
        return torch.zeros((*axes, rows, 1), dtype=torch.int64)

    def feed_prompt(self, inputs: Inputs, size: int | None = None, *, last: int = 0, embedded: bool = False) -> "Loop":
        """A processor's prompt in pieces of `size` tokens, or in two with `last` tokens in the second, or whole.

        Its pictures come with the first piece, which reaches to their end.
        """
        inputs = {**inputs, "position_ids": positions(self.bench.guarded, inputs)[0]}
        tokens, places = inputs["input_ids"].shape[1], inputs["input_ids"] == image_token(self.bench.guarded)
        pictured = int(places.any(0).nonzero().max()) + 1 if places.any() else 1
        if embedded:
            embeds = self.model.get_input_embeddings()(inputs["input_ids"])  # (rows, tokens, hidden)
            inputs["inputs_embeds"] = embeds
            del inputs["input_ids"]
        step = size or (tokens - last)
        ends = [*(end for end in range(step, tokens, step) if end >= pictured), tokens]
        for start, end in zip([0, *ends], ends, strict=False):
            piece = {name: value[:, start:end] for name, value in inputs.items() if name in PER_TOKEN}
            piece["position_ids"] = inputs["position_ids"][..., start:end]
            self.feed(piece if start else inputs | piece)
        return self

    def say(self, count: int = TOKENS, *, embedded: bool = False, until: set[int] | None = None) -> Tensor:
        """Greedy tokens (rows, up to `count`), each fed as it is said; ends sooner where all say one of `until`."""
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
        assert self.mask is not None and self.next is not None
        self.cache.crop(-dropped)
        length = self.mask.shape[1] - dropped
        self.mask, self.next = self.mask[:, :length], self.next - dropped
        self.types = None if self.types is None else self.types[:, :length]
        return self

    def pick(self, rows: Tensor) -> "Loop":
        """Keep these rows of the batch, in this order, some perhaps several times."""
        assert self.mask is not None and self.next is not None
        self.cache.batch_select_indices(rows)
        self.mask, self.next, self.logits = self.mask[rows], self.next[..., rows, :], self.logits[rows]
        self.types = None if self.types is None else self.types[rows]
        return self


def turns(bench: Bench) -> list[list[int]]:
    """What the turns of a conversation add, each with the generation prompt at its end."""
    first, *others = ("where can the dog run", "make a cake", "tell me how", "list ideas")
    mark, found = "@@", [bench.chat(("user", first))["input_ids"][0].tolist()]
    for text in others:
        messages = [("user", first), ("assistant", mark), ("user", text)]
        chat = [{"role": role, "content": [{"type": "text", "text": said}]} for role, said in messages]
        whole = bench.guarded.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        found.append(bench.tokenizer(whole.split(mark)[1], add_special_tokens=False)["input_ids"])
    return found


def joined(history: list[int], turn: list[int]) -> list[int]:
    """A conversation and its next turn. The last answer may have ended already with what begins the turn."""
    return history + (turn[1:] if history[-1:] == turn[:1] else turn)


def converse(bench: Bench, model: Any, size: int | None) -> Transcript:
    """A conversation on a kept cache, its turns fed in pieces of `size` tokens or each at once."""
    loop, history, transcript = Loop(bench, model), list[int](), Transcript()
    for turn in turns(bench):
        before = joined(history, turn)
        for piece in torch.tensor([before[len(history) :]]).split(size or len(before), dim=1):
            loop.feed({"input_ids": piece})
        said = loop.say(until=bench.guarded.ends)  # (1, tokens)
        transcript.append((before, said))
        history = before + said[0].tolist()
    return transcript
