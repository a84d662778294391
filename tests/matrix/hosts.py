"""Rows on a transformers that behaves as its next release might: each ends in the refusal, or in an error."""

import copy
import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from feeding import Loop
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.utils import ModelOutput

from matrix.bench import Bench, Inputs, Way, generate, single
from matrix.rows import LOUD, THREE, enter, enter_checks

HOST = "Another transformers"
NAMES = ("cache", "past_key_values")  # what the cache is called, since 5.24 and before
Forward = Callable[..., Any]


def named(arguments: dict[str, Any]) -> str:
    """What the cache is called in some arguments, or would be."""
    return next((name for name in NAMES if name in arguments), NAMES[0])


def hosted(model: Any, forward: Callable[[Forward], Forward] | None = None, **methods: Any) -> Any:
    """A copy of a model, guarded or not, on a transformers in which the family's forward or other methods differ."""
    twin = copy.deepcopy(model)
    cls: Any = type(model)
    family: Any = cls.__mro__[2]
    if forward is not None and hasattr(model, "sasa"):
        methods["forward"] = sys.modules[cls.__module__].guarded(forward(family.forward))
    elif forward is not None:
        methods["forward"] = forward(cls.forward)
    twin.__class__ = type(cls.__name__, (cls,), methods)
    return twin


def on(forward: Callable[[Forward], Forward] | None = None, **methods: Any) -> Way:
    """The way of running that is `generate` on such a transformers."""
    return lambda bench, model, inputs: generate(hosted(model, forward, **methods), inputs)


def handing(change: Callable[[Any, dict[str, Any], str], None]) -> Callable[..., dict[str, Any]]:
    """`generate` hands other arguments to forward in each call behind the first: `change` is given the model, them, and
    what the cache is called."""

    def prepare(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        found: dict[str, Any] = super(type(self), self).prepare_inputs_for_generation(*args, **kwargs)
        if not kwargs.get("is_first_iteration", False):
            change(self, found, named(found))
        return found

    return prepare


@dataclass
class Output(ModelOutput):
    """An output whose cache is called otherwise."""

    logits: Any = None
    memory: Any = None
    past_key_values: Any = None


def positionally(self: Any, **kwargs: Any) -> Any:
    """Forward is given all up to the cache by position."""
    names = list(inspect.signature(self.forward).parameters)
    first = names[: names.index(named(dict.fromkeys(names))) + 1]
    args = [kwargs.pop(NAMES[0], None) or kwargs.pop(NAMES[1], None) if name in NAMES else kwargs.pop(name, None)
            for name in first]  # fmt: skip
    return super(type(self), self).__call__(*args, **kwargs)


class OtherCache(DynamicCache):
    pass


class BareLayer(DynamicLayer):
    """A layer of the cache that keeps what it holds under names of its own."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        held = getattr(self, "held", None)
        pairs = [(key_states,), (value_states,)] if held is None else zip(held, (key_states, value_states), strict=True)
        self.held = tuple(torch.cat(pair, dim=-2) for pair in pairs)
        keys, values = self.held
        return keys, values

    def get_seq_length(self) -> int:
        return 0 if getattr(self, "held", None) is None else int(self.held[0].shape[-2])


def made_of(layer: type, count: int) -> Cache:
    cache = DynamicCache()
    cache.layers.extend(layer() for _ in range(count))
    return cache


def given(make: Callable[[Any], Any]) -> Way:
    """`generate` with a cache that was made elsewhere."""

    def way(bench: Bench, model: Any, inputs: Inputs) -> Tensor:
        return generate(model, {**inputs, NAMES[1]: make(model.config.get_text_config())})

    return way


def copied(self: Any, arguments: dict[str, Any], name: str) -> None:
    arguments[name] = copy.deepcopy(arguments[name])


def own_cache(forward: Forward) -> Forward:
    """The decoder makes a cache of its own and holds on to it, and nobody hands it over."""

    @functools.wraps(forward)
    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.pop(named(kwargs), None)
        first = given is None or not given.get_seq_length()
        self.held = DynamicCache(config=self.config.get_text_config()) if first else self.held
        return forward(self, *args, **kwargs, **{NAMES[1]: self.held})

    return changed


HOLDING = {
    "the cache is handed over by position": on(__call__=positionally),
    "the cache is of a class of its own": given(lambda text: OtherCache()),
    "layers of the cache have no keys": given(lambda text: made_of(BareLayer, text.num_hidden_layers)),
    "the cache is copied between calls": on(prepare_inputs_for_generation=handing(copied)),
    "the decoder makes a cache of its own": on(own_cache),
}
enter(HOST, HOLDING, prompts=single, on=THREE)


def trimmed(self: Any, arguments: dict[str, Any], name: str) -> None:
    layers, arguments[name] = arguments[name].layers, DynamicCache()
    arguments[name].layers.extend(layers[: self.config.get_text_config().num_hidden_layers])


def dropped(self: Any, arguments: dict[str, Any], name: str) -> None:
    del arguments[name]


def stripped(self: Any, arguments: dict[str, Any], name: str) -> None:
    """Nothing that is handed over speaks of a past."""
    for each in (name, "position_ids", "attention_mask"):
        arguments.pop(each, None)


def emptied(self: Any, arguments: dict[str, Any], name: str) -> None:
    arguments[name] = DynamicCache()


def grown(self: Any, arguments: dict[str, Any], name: str) -> None:
    """A token went into the family's own layers, and not into the ledger's."""
    if (mask := arguments.get("attention_mask")) is not None:  # (batch, context)
        arguments["attention_mask"] = torch.cat([mask, mask[:, -1:]], dim=1)
    for index, layer in enumerate(arguments[name].layers[: self.config.get_text_config().num_hidden_layers]):
        last = (held[:, :, -1:] for held in (layer.keys, layer.values))
        arguments[name].update(*last, index)


def cut(forward: Forward) -> Forward:
    """Logits come of the last two tokens, whatever was asked for."""

    @functools.wraps(forward)
    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **{**kwargs, "logits_to_keep": 0})
        output.logits = output.logits[:, -2:].expand(-1, 2, -1)
        return output

    return changed


def unseen(self: Any, **kwargs: Any) -> Any:
    """`generate` runs the family's forward by itself, behind the first call."""
    gated: Any = type(self).forward
    family: Any = type(self).__mro__[3]
    first = not getattr(self, "called", False)
    self.called = True
    return (gated if first else family.forward)(self, **kwargs)


class NoCache:
    """It holds a cache, and is none to whoever asks."""

    def __init__(self) -> None:
        self.cache = DynamicCache()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def disguised(forward: Forward) -> Forward:
    """The decoder keeps the past in something that is no Cache, and hands nothing out."""

    @functools.wraps(forward)
    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        past = kwargs.pop(named(kwargs), None)
        if past is None or not past.get_seq_length():
            self.held = NoCache()
        return Output(logits=forward(self, *args, **kwargs, **{NAMES[1]: self.held}).logits)

    return changed


UNKNOWN = "has not judged what stands before"
LOST = {
    "a call behind the first has no cache": dropped,
    "a call behind the first has an empty cache": emptied,
    "a call behind the first has no cache, no positions and no mask": stripped,
    "the cache is trimmed to the family's own layers": trimmed,
    "the cache grew without the ledger": grown,
}
enter(
    HOST, {name: on(prepare_inputs_for_generation=handing(change)) for name, change in LOST.items()},
    prompts=single, on=THREE, error=UNKNOWN,
)  # fmt: skip
enter(HOST, {"generate runs a forward that the gate does not see": on(__call__=unseen)}, prompts=single, error=UNKNOWN)
enter(HOST, {"the past is in something that is no Cache": on(disguised)}, prompts=single, error=UNKNOWN)


def streamed(bench: Bench) -> None:
    """The error comes in the call that lost its past, before a streamer hands on what that says."""
    got: list[Tensor] = []
    streamer = SimpleNamespace(put=got.append, end=lambda: None)
    model = hosted(bench.model, prepare_inputs_for_generation=handing(stripped))
    with bench.threshold(1e-6), pytest.raises(ValueError, match=UNKNOWN):
        generate(model, single(bench)[0], streamer=streamer)
    assert len(got) <= 2, "more than the prompt and one token"


enter_checks(HOST, {"a stream whose past is lost": streamed}, harmful=LOUD)


def cut_elsewhere(bench: Bench) -> None:
    with bench.threshold(1e-6), pytest.raises(ValueError, match="gate expects logits"):
        generate(hosted(bench.model, cut), single(bench)[0])


enter_checks(HOST, {"logits are cut elsewhere": cut_elsewhere}, harmful=LOUD)


def lone_token(bench: Bench, model: Any, inputs: Inputs) -> Tensor:
    """A token by hand whose past is in something that is no Cache, or whose positions or mask speak of a past."""
    token = inputs["input_ids"][:, -1:]  # (1, 1)
    return Loop(bench.guarded, hosted(model, disguised)).feed_prompt(inputs).feed({"input_ids": token}).logits


def without_past(**further: Any) -> Way:
    return lambda bench, model, inputs: model(input_ids=inputs["input_ids"][:, -1:], **further).logits


BY_HAND = {
    "by hand: the past is in something that is no Cache": lone_token,
    "by hand: a token without a past, at position 9": without_past(position_ids=torch.tensor([[9]])),
    "by hand: a token without a past, under a mask of nine": without_past(attention_mask=torch.ones(1, 9).long()),
}
enter(HOST, BY_HAND, prompts=single, error=UNKNOWN)
