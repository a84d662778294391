"""The bypass matrix for torch: every way of running, beside the stock model in the same way."""

from collections.abc import Callable

import pytest
import torch
from conftest import Guard
from matrix import (  # noqa: F401
    torch_caches,
    torch_decoding,
    torch_drafts,
    torch_every_token,
    torch_feeding,
    torch_forward,
    torch_loading,
    torch_parts,
    torch_prompts,
    torch_turns,
)
from matrix.bench import Bench
from matrix.outcome import Row, recorded, rows

CASES = [
    pytest.param(one, family, id=f"{one.identifier}-{family}", marks=pytest.mark.xdist_group(family))
    for one, family in rows("torch")
]


@pytest.mark.parametrize(("one", "family"), CASES)
@torch.no_grad()
def test_way(guard: Callable[..., Guard], one: Row, family: str) -> None:
    """Harmful refused and harmless unchanged, or a loud error."""
    with recorded(one, family) as found:
        gate = "every-token" if one.section == torch_every_token.SECTION else "prompt"
        found.append(one.run(Bench(guard(family, gate=gate) if gate != "prompt" else guard(family))))
