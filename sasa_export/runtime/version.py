"""Checks the version of transformers, before anything is imported that another version may lack."""

import transformers

TRIED = ("5.23.0", "5.24.0", "5.25.0")  # on any other version a model proves its gate before it loads

if int(transformers.__version__.split(".")[0]) < 5:
    what = f"this guarded model needs transformers 5 or newer, and {transformers.__version__} is installed"
    raise ImportError(f"{what}. Install it with: pip install transformers=={TRIED[-1]}")
