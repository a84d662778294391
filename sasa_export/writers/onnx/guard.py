"""The guard as an exported graph holds it: every step of it is there, whatever the call that is traced brings, and it
notices that somebody changed the graph's weights, by one state that it had when it was exported."""

from __future__ import annotations

from typing import Any

import torch

from sasa_export.runtime.host import find_cache, read_ledger

# Of the state's length. On smol-llava float16 is 0.001 away, weights in blocks of 8 bits 0.012, of 4 bits 0.19.
TOLERANCE = 0.005


class Witness:
    """What a model projects for the token that every prompt of its template begins with: it sees no other one.

    Args: model: a guarded one, as it will be exported; first: the token's id.
    """

    @torch.no_grad()
    def __init__(self, model: Any, first: int) -> None:
        ids = torch.tensor([[first]])
        cache = find_cache(model(input_ids=ids, use_cache=True).values())
        kept = read_ledger(cache, model.sasa.ledger, 0)
        self.state = model.sasa.ledger.unpack(kept)[1][0, 0].float()  # (hidden,)
        self.embedding = model.get_input_embeddings()(ids)[0, 0]  # (hidden,)

    def __call__(self, projection: torch.Tensor, embeddings: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """The projection (batch, tokens, hidden), NaN in rows where it is not what it was: they are refused.

        Args: embeddings: (batch, tokens, hidden); first: which token is the first of its row, padding aside, (batch,
        tokens).
        """
        known = first & (embeddings == self.embedding).all(-1)  # (batch, tokens)
        squares = (projection.float() - self.state).square().sum(-1)  # (batch, tokens)
        near = squares < TOLERANCE**2 * self.state.square().sum()
        changed = (known & ~near).any(-1)  # (batch,)
        return projection.masked_fill(changed[:, None, None], float("nan"))


def first_token(processor: Any) -> int:
    """The id of the token that prompts of the processor's chat template begin with."""
    chat = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    return int(processor(text=[text], return_tensors="pt")["input_ids"][0, 0])


class ExportedGuard:
    """Mixed into a model's Guard: no step is left out, nothing is logged, and a `witness` looks at its weights."""

    witness: Witness | None = None

    def _any(self, flags: torch.Tensor) -> bool:
        return True

    def _read(self, model: Any, kwargs: dict[str, Any], *others: Any) -> Any:
        call, context = super()._read(model, kwargs, *others)  # type: ignore[misc]
        if self.witness is not None:
            first = context.real & (context.real.cumsum(-1) == 1)  # (batch, context)
            first = first[:, -call.numbers.shape[1] :]  # (batch, tokens)
            context = context._replace(projection=self.witness(context.projection, kwargs["inputs_embeds"], first))
        return call, context

    def _judge(self, model: Any, context: Any, due: Any) -> torch.Tensor:
        found = super()._judge(model, context, due)  # type: ignore[misc]
        if self.witness is None:
            return found
        # What the witness said of an earlier call stands where the lane may not reach.
        _, states = self.ledger.unpack(context.kept or self.ledger.empty(context.projection))  # type: ignore[attr-defined]
        lost = (states != states).sum((1, 2)) > 0  # (batch,); of no tokens, `any` would have no value in ONNX
        return found.masked_fill(lost, float("nan"))

    def _report(self, output: Any, call: Any, due: Any, held: torch.Tensor, request: Any) -> None:
        output["is_due"] = due.rows.any()  # () bool: the second lane's branch runs where it holds


def for_export(model: Any) -> None:
    """Make the Guard of a guarded model one that can be exported."""
    cls = type(model.sasa)
    if not issubclass(cls, ExportedGuard):
        model.sasa.__class__ = type(cls.__name__, (ExportedGuard, cls), {})
