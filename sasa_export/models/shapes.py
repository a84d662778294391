"""Run a model without its weights: floating-point tensors have only a shape, integer tensors are computed.

A forward pass over a picture depends on integers (ids, grids, sizes), which are known, and never on weights.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from sasa_export.models import Source
from sasa_export.models.load import check_loaded, explained, stock_classes, stock_config
from sasa_export.models.quantized import check_scales, scheme

META = torch.device("meta")
COUNTED = (torch.ops.aten.linspace.default,)  # computed, because positions in a picture are rounded from it
INDEXED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


@contextmanager
def skeleton(source: Source) -> Iterator[Any]:
    """Yield the stock model without weights: shapes alone, no memory. The model runs only within the context.

    Raises OpenError where plain (unquantized) shards lack a tensor of the model, or hold it in another shape.
    """
    from transformers.initialization import no_init_weights

    with explained(f"the config.json of {source.name} describes no model"):
        if scheme(source.config) is None:
            model = _load_shapes(source)
        else:  # layers of a quantization scheme do not run on shapes
            check_scales(source)
            with no_init_weights(), META:
                model = stock_classes(source)[1]._from_config(stock_config(source)).eval()  # type: ignore[attr-defined]
    with ShapesOnly():
        yield model


def _load_shapes(source: Source) -> Any:
    """Return the stock model, loaded by transformers from the shapes and types in the shards."""
    from transformers.modeling_utils import str_to_torch_dtype

    stored: dict[str, Tensor] = {}
    for shard in source.shards:
        for key, shape, kind in zip(shard.keys, shard.shapes, shard.types, strict=True):
            stored[key] = torch.empty(shape, dtype=str_to_torch_dtype[kind], device=META)
    with redirect_stderr(io.StringIO()):  # hides progress bars
        model, info = stock_classes(source)[1].from_pretrained(  # type: ignore[attr-defined]
            None, config=stock_config(source), state_dict=stored, device_map={"": META},
            output_loading_info=True, ignore_mismatched_sizes=True,
            use_kernels=False,  # kernels of the hub have no shapes alone
        )  # fmt: skip
    check_loaded(source, info)
    return model


class ShapesOnly(TorchDispatchMode):
    """A mode that runs meta tensors together with integer tensors in memory, and ignores requested devices."""

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "device"}
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if not tensors:
            return self._made(func, args, kwargs)
        if not any(tensor.is_meta for tensor in tensors):
            return func(*args, **kwargs)
        if func in INDEXED:
            args = (args[0], [part for index in args[1] for part in _numbers(index)], *args[2:])
        changed = args[0] if func.__name__.split(".")[0].endswith("_") else None  # an in-place operation
        if isinstance(changed, Tensor) and not changed.is_meta and not changed.is_floating_point():
            raise NotImplementedError(f"{func} would write numbers that nobody knows into whole ones")
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(META), (args, kwargs))
        if func is torch.ops.aten._grouped_mm.default:  # of experts; torch infers its shapes only in bfloat16
            args = tree_map_only(Tensor, lambda held: held.bfloat16() if held.is_floating_point() else held, args)
            return func(*args, **kwargs).to(tensors[0].dtype)
        return func(*args, **kwargs)

    def _made(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Return a new tensor. A floating-point tensor has no content."""
        if func in COUNTED:
            return func(*args, **kwargs, device=torch.device("cpu"))
        placed = any(argument.name == "device" for argument in func._schema.arguments)  # type: ignore[attr-defined]
        made = func(*args, **kwargs, **({"device": META} if placed else {}))
        whole = isinstance(made, Tensor) and made.is_meta and not made.is_floating_point()
        return func(*args, **kwargs, device=torch.device("cpu")) if whole else made


def _numbers(index: Any) -> list[Any]:
    """Return a mask as integer indices, because the result's shape depends on the mask's content."""
    if isinstance(index, Tensor) and index.dtype == torch.bool:
        return list(index.nonzero().unbind(1))
    return [index]
