"""Model Runner V2 on a CPU: its Triton kernels run in Triton's interpreter. Imported before vLLM is.

What the interpreter cannot run is replaced: top-k and top-p, by what vLLM has for it in PyTorch.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

from types import SimpleNamespace

import triton.backends

triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
