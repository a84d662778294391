"""Rows on a transformers that behaves as its next release might: each ends in the refusal, or in an error.

That names change, test_names_of_others tries; here what is handed over does.
"""

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from feeding import CACHE, NAMES, Loop
from transformers import DynamicCache

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


def on(forward: Callable[[Forward], Forward] | None = None, kernels: bool = False, **methods: Any) -> Way:
    """The way of running that is `generate` on such a transformers, with or without kernels of the hub."""
    treated = kernelized if kernels else lambda model: model
    return lambda bench, model, inputs: generate(hosted(treated(model), forward, **methods), inputs)


class Kernel:
    """A kernel of the hub, as far as the package `kernels` looks: a class, of which it takes the forward."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward

    def load(self) -> type:
        return type("Kernel", (torch.nn.Module,), {"forward": self.forward})


def same(forward: Forward) -> Forward:
    """A kernel that computes what the forward computes."""
    return functools.wraps(forward)(lambda *args, **kwargs: forward(*args, **kwargs))


def kernelized(model: Any, own: bool = False, change: Callable[[Forward], Forward] | None = None) -> Any:
    """A copy of a model, guarded or not, in which a kernel stands in for the forward of each module from the decoder
    down, as transformers (5.25) puts them there at load. With `own`, one also does for the model's own. `change`, where
    given, is what the decoder's kernel does otherwise."""
    package, twin = pytest.importorskip("kernels"), copy.deepcopy(model)
    path = next(name for name, module in twin.named_modules() if hasattr(module, "layers") and "vision" not in name)
    decoder, found = twin.get_submodule(path), {}
    for module in (*decoder.modules(), *([twin] if own else ())):
        cls: Any = next(cls for cls in type(module).__mro__ if not cls.__module__.endswith("modeling_sasa"))
        if cls.__module__.startswith("transformers."):
            found[cls] = Kernel((change if change and module is decoder else same)(cls.forward))
    mapping = {repr(cls): {"cpu": kernel} for cls, kernel in found.items()}
    with pytest.MonkeyPatch.context() as patch, package.use_kernel_mapping(mapping, inherit_mapping=False):
        for cls in found:
            patch.setattr(cls, "kernel_layer_name", repr(cls), raising=False)
        package.kernelize(twin, mode=package.Mode.INFERENCE, device="cpu")
    placed = [module for module in decoder.modules() if "forward" in vars(module)]
    assert len(placed) > len(decoder.layers) and decoder in placed
    return twin


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


def with_kernels(ways: Mapping[str, Callable[..., Way]]) -> dict[str, Way]:
    """Each way without kernels of the hub, and with them."""
    ends = {"": False, ", with kernels of the hub": True}
    return {f"{name}{end}": way(kernels=kernels) for name, way in ways.items() for end, kernels in ends.items()}


HOLDING = {
    "the cache is handed over by position": functools.partial(on, __call__=positionally),
    "the decoder makes a cache of its own": functools.partial(on, own_cache),
}
enter(HOST, with_kernels(HOLDING), prompts=single, on=THREE)


def own_kernel(bench: Bench, model: Any, inputs: Any) -> torch.Tensor:
    return Loop(bench.guarded, kernelized(model, own=True)).feed_prompt(inputs).say()


KERNELS = {
    "kernels of the hub": lambda bench, model, inputs: generate(kernelized(model), inputs),
    "a kernel of the hub for the model's own forward": lambda bench, model, inputs: generate(
        kernelized(model, own=True), inputs
    ),
    "a kernel of the hub for the model's own forward, by hand": own_kernel,
}
enter(HOST, KERNELS, on=THREE)


def unseen(forward: Forward) -> Forward:
    """A decoder's kernel that runs the blocks' forwards, and not the blocks."""

    @functools.wraps(forward)
    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        blocks = self._modules.pop("layers")
        self.__dict__["layers"] = [block.forward for block in blocks]
        try:
            return forward(self, *args, **kwargs)
        finally:
            del self.__dict__["layers"]
            self._modules["layers"] = blocks

    return changed


UNSEEN = {
    "a kernel of the hub that runs the blocks by itself": lambda bench, model, inputs: generate(
        kernelized(model, change=unseen), inputs
    ),
}
enter(HOST, UNSEEN, prompts=single, error="the gate did not see")


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
LOSING = {name: functools.partial(on, prepare_inputs_for_generation=handing(change)) for name, change in LOST.items()}
enter(HOST, with_kernels(LOSING), prompts=single, on=THREE, error=UNKNOWN)


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
