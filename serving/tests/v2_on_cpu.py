"""Model Runner V2 on a CPU: its Triton kernels run in Triton's interpreter. Imported before vLLM is; run as a program,
it is vLLM's OpenAI server, whose processes do the same."""

import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"

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

from vllm.v1.sample.ops import topk_topp_sampler  # noqa: E402

topk_topp_sampler.HAS_TRITON = False  # the interpreter cannot run its kernel

if __name__ == "__main__":
    import runpy

    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
