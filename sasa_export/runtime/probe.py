"""The probe of a guarded model, as a module."""

from collections.abc import Callable

import torch
from torch import nn

from sasa_export.runtime.formulas import unsafe_probability
from sasa_export.runtime.nodes import HOW_TO_LOAD


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
