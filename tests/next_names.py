"""Makes this process's transformers one without the names that it deprecates, as it announces for 5.40: the cache is
called `cache` and nothing else. A plugin of pytest (-p next_names), since it has to come before any model's module."""

from typing import Any

import transformers
from transformers.utils import deprecation, generic

VERSION = "5.40.0"
GONE = ("past_key_values", "cache_params")
rename = deprecation.deprecate_kwarg


def kept(old_name: str, *args: Any, **kwargs: Any) -> Any:
    """A decorator that no longer knows the old name, so that a forward takes it for any other argument."""
    return (lambda function: function) if old_name in GONE else rename(old_name, *args, **kwargs)


if hasattr(generic.ModelOutput, "_replace_old_cache_name"):  # since 5.24
    deprecation.deprecate_kwarg = kept
    generic._rename_kwargs_for_bc = lambda kwargs: None
    generic.ModelOutput._replace_old_cache_name = staticmethod(lambda name: name)
    for name in GONE:
        delattr(generic.ModelOutput, name)
    transformers.__version__ = VERSION
