"""What people do to a loaded model: compile, shard and trace it, give it caches of windows, stream from it."""

import copy
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from conftest import Guard
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from sasa_export.runtime.host import real_tokens

Guards = Callable[..., Guard]


@torch.no_grad()
def test_static_caches_where_every_block_has_a_window(guard: Guards) -> None:
    """The gate's own layers of the cache are longer than the windows; the verdicts and tokens are those without it."""
    guarded = guard("mistral3", tiny.SAFETY, tiny.SEMANTIC)
    model, stock = copy.deepcopy(guarded.model), copy.deepcopy(guarded.stock)
    for each in (model, stock):
        each.config.get_text_config().sliding_window = 8
    inputs = guarded.batch(images=False)
    assert inputs["input_ids"].shape[1] > 8
    options = {"cache_implementation": "static", "max_new_tokens": 4}
    with guarded.at(1 - 1e-6, model):
        assert torch.equal(model.generate(**inputs, **options), stock.generate(**inputs, **options))
    with guarded.at(1e-6, model):
        said = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    assert said.tolist() == [guarded.refusal[:4]] * len(said)


@torch.no_grad()
def test_the_inner_model_compiled(guard: Guards) -> None:
    guarded = guard("llava")
    inputs, model = guarded.batch(images=False), copy.deepcopy(guarded.model)
    model.model = torch.compile(model.model, backend="eager")
    found = model(**inputs).unsafe_probability
    torch.testing.assert_close(found, guarded.expected(inputs), rtol=0.0, atol=1e-5)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("shard", [fully_shard, FullyShardedDataParallel])
@torch.no_grad()
def test_sharded(guard: Guards, alone: None, shard: Any) -> None:
    """FSDP of both kinds takes the probe, and refuses."""
    guarded = guard("llava")
    inputs, model = guarded.batch(images=False), copy.deepcopy(guarded.model)
    options = {"device_id": torch.device("cpu")} if shard is FullyShardedDataParallel else {}
    sharded = shard(model, **options)
    with guarded.at(1e-6, model):
        logits = sharded(**inputs).logits[:, -1]  # (batch, vocabulary)
    assert (logits.argmax(-1) == guarded.refusal[0]).all()


def test_a_trace_raises(guard: Guards) -> None:
    with pytest.raises(NotImplementedError, match="would freeze a verdict"):
        torch.jit.trace(guard("llava").model, (torch.tensor([[1, 60, 61]]),), strict=False)


@torch.no_grad()
def test_a_streamer_gets_no_token_that_the_gate_did_not_see(guard: Guards) -> None:
    """`generate` runs the family's forward from its first call on."""
    guarded, got = guard("llava"), list[Tensor]()
    twin = copy.deepcopy(guarded.model)
    stock: Any = type(guarded.stock)

    def unseen(self: Any, *args: Any, sasa_request: Any = None, **kwargs: Any) -> Any:
        return stock.forward(self, *args, **kwargs)

    twin.__class__ = type("Unseen", (type(twin),), {"__call__": unseen})
    streamer = SimpleNamespace(put=got.append, end=lambda: None)
    with pytest.raises(ValueError, match="has not judged"):
        twin.generate(**guarded.batch(images=False, count=1), max_new_tokens=4, streamer=streamer)
    assert len(got) == 1, "more than the prompt"


@pytest.mark.parametrize("mask", [{}, "none", torch.ones(2, 2, 3), torch.ones(2, 1, 1, 3)])
def test_masks_that_cannot_be_read(mask: Any) -> None:
    """Unknown is never nothing."""
    with pytest.raises(ValueError, match="cannot tell padding from text"):
        real_tokens(mask, 3, torch.ones(2, 3))
