"""Model Runner V2 on a CPU: its Triton kernels run in Triton's interpreter. Imported before vLLM is."""

import os

os.environ["TRITON_INTERPRET"] = "1"

from types import SimpleNamespace
from typing import Any

import triton.backends
from triton.runtime.interpreter import InterpreterBuilder

triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
store = InterpreterBuilder.create_masked_store


def masked_store(builder: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
    """The interpreter's own, for masks of any type: those of the kernel for grammars are numbers."""
    mask.data = mask.data.astype(bool)
    return store(builder, pointers, value, mask, *args)


InterpreterBuilder.create_masked_store = masked_store
