"""One check of a patched directory: passed or not, and the number behind it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """`name` says what holds, `detail` what was measured."""

    name: str
    passed: bool
    detail: str
