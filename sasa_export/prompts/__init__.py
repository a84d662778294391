"""Labelled prompts: the built-in sets, published data sets, and the user's own files.

A spec names a data set: `name:PATH`, then options after commas (`mm-safetybench:DIR,variant=SD+TYPO`). A bare path
is a JSONL file or a table. Error messages name the file and the faulty record.
"""

from sasa_export.prompts.builtin_sets import builtin, builtin_evaluation, for_model
from sasa_export.prompts.leak import check_disjoint, grouped
from sasa_export.prompts.prompt import Prompt, asked, encode
from sasa_export.prompts.registry import DATA_SETS, calibration_prompts, check_labels, load, load_all, lopsided

__all__ = [
    "DATA_SETS",
    "Prompt",
    "asked",
    "builtin",
    "builtin_evaluation",
    "calibration_prompts",
    "check_disjoint",
    "check_labels",
    "encode",
    "for_model",
    "grouped",
    "load",
    "load_all",
    "lopsided",
]
