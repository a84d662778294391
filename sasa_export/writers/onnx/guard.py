"""The guard as an exported graph holds it: every step of it is there, whatever the call that is traced brings."""

from __future__ import annotations

from typing import Any

import torch

from sasa_export.writers.onnx.witness import Witness


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

    def _report(self, output: Any, call: Any, due: Any, held: torch.Tensor) -> None:
        output["is_due"] = due.rows.any()  # () bool: the second lane's branch runs where it holds


def for_export(model: Any) -> None:
    """Make the Guard of a guarded model one that can be exported."""
    cls = type(model.sasa)
    if not issubclass(cls, ExportedGuard):
        model.sasa.__class__ = type(cls.__name__, (ExportedGuard, cls), {})
