"""The signature of a graph."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Signature:
    """Names of a graph's inputs and outputs in order, and the symbols of their dimensions."""

    inputs: dict[str, tuple[str | int, ...]]
    outputs: dict[str, tuple[str | int, ...]]
