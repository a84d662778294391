"""Rows on a transformers that behaves as its next release might: each ends in the refusal, or in an error.

That names change, test_names_of_others tries; here what is handed over does.
"""

import copy
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from feeding import CACHE, NAMES
from matrix.bench import Bench, Way, generate, single
from matrix.rows import LOUD, THREE, enter, enter_checks

HOST = "Another transformers"
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


def positionally(self: Any, **kwargs: Any) -> Any:
    """Forward is given all up to the cache by position."""
    names = list(inspect.signature(self.forward).parameters)
    first = names[: names.index(named(dict.fromkeys(names))) + 1]
    args = [kwargs.pop(NAMES[0], None) or kwargs.pop(NAMES[1], None) if name in NAMES else kwargs.pop(name, None)
            for name in first]  # fmt: skip
    return super(type(self), self).__call__(*args, **kwargs)


def own_cache(forward: Forward) -> Forward:
    """The decoder makes a cache of its own and holds on to it, and nobody hands it over."""

    @functools.wraps(forward)
    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.pop(named(kwargs), None)
        first = given is None or not given.get_seq_length()
        self.held = DynamicCache(config=self.config.get_text_config()) if first else self.held
        return forward(self, *args, **kwargs, **{CACHE: self.held})

    return changed


HOLDING = {
    "the cache is handed over by position": on(__call__=positionally),
    "the decoder makes a cache of its own": on(own_cache),
}
enter(HOST, HOLDING, prompts=single, on=THREE)


def emptied(self: Any, arguments: dict[str, Any], name: str) -> None:
    arguments[name] = DynamicCache()


def stripped(self: Any, arguments: dict[str, Any], name: str) -> None:
    """Nothing that is handed over speaks of a past."""
    for each in (name, "position_ids", "attention_mask"):
        arguments.pop(each, None)


def trimmed(self: Any, arguments: dict[str, Any], name: str) -> None:
    layers, arguments[name] = arguments[name].layers, DynamicCache()
    arguments[name].layers.extend(layers[: self.config.get_text_config().num_hidden_layers])


def grown(self: Any, arguments: dict[str, Any], name: str) -> None:
    """A token went into the family's own layers, and not into the ledger's."""
    if (mask := arguments.get("attention_mask")) is not None:  # (batch, context)
        arguments["attention_mask"] = torch.cat([mask, mask[:, -1:]], dim=1)
    for index, layer in enumerate(arguments[name].layers[: self.config.get_text_config().num_hidden_layers]):
        last = (held[:, :, -1:] for held in (layer.keys, layer.values))
        arguments[name].update(*last, index)


UNKNOWN = "has not judged what stands before"
LOST = {
    "a call behind the first has an empty cache": emptied,
    "a call behind the first has no cache, no positions and no mask": stripped,
    "the cache is trimmed to the family's own layers": trimmed,
    "the cache grew without the ledger": grown,
}
enter(
    HOST, {name: on(prepare_inputs_for_generation=handing(change)) for name, change in LOST.items()},
    prompts=single, on=THREE, error=UNKNOWN,
)  # fmt: skip


def without_past(**further: Any) -> Way:
    """A token by hand whose positions or mask speak of a past."""
    return lambda bench, model, inputs: model(input_ids=inputs["input_ids"][:, -1:], **further).logits


BY_HAND = {
    "by hand: a token without a past, at position 9": without_past(position_ids=torch.tensor([[9]])),
    "by hand: a token without a past, under a mask of nine": without_past(attention_mask=torch.ones(1, 9).long()),
}
enter(HOST, BY_HAND, prompts=single, error=UNKNOWN)


def cut(forward: Forward) -> Forward:
    """Logits come of the last two tokens, whatever was asked for."""

    @functools.wraps(forward)
    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **{**kwargs, "logits_to_keep": 0})
        output.logits = output.logits[:, -2:].expand(-1, 2, -1)
        return output

    return changed


def cut_elsewhere(bench: Bench) -> None:
    with bench.threshold(1e-6), pytest.raises(ValueError, match="gate expects logits"):
        generate(hosted(bench.model, cut), single(bench)[0])


enter_checks(HOST, {"logits are cut elsewhere": cut_elsewhere}, harmful=LOUD)
