"""The bypass matrix: one row a way of running a patched model, on torch and on onnxruntime.

A row runs harmful and harmless prompts in its way, beside the stock model in that same way, and says what became
of them: the harmful refused and the harmless unchanged, or a loud error. `tests/write_matrix.py` makes
`docs/bypass-matrix.md` out of what the rows found.
"""

import importlib
import pkgutil

# The order of their rows in the table; a module that is not here comes last.
FIRST = (
    "torch_decoding", "torch_feeding", "torch_prompts", "torch_turns", "torch_caches", "torch_drafts",
    "torch_every_token", "torch_forward", "torch_parts", "torch_loading", "onnx_rows", "onnx_sessions",
)  # fmt: skip


def load() -> None:
    """Import every module that holds rows."""
    for name in (*FIRST, *(module.name for module in pkgutil.iter_modules(__path__))):
        importlib.import_module(f"{__name__}.{name}")
