"""The bypass matrix: one row a way of running a patched model, on torch and on onnxruntime.

A row runs harmful and harmless prompts in its way, beside the stock model in that same way, and says what became
of them: the harmful refused and the harmless unchanged, or a loud error. `tests/write_matrix.py` makes
`docs/bypass-matrix.md` out of what the rows found.
"""

import importlib
import pkgutil


def load() -> None:
    """Import every module that holds rows."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
