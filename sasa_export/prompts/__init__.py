"""Labelled prompts as the field keeps them: one small loader a data set, one record for all of them.

A data set is named by a spec: `name:PATH`, options behind commas (`mm-safetybench:DIR,variant=SD+TYPO`); a bare path
is a JSONL file of ours. Every loader checks what it reads and names the file and the record that is wrong.
"""

from sasa_export.errors import DataError
from sasa_export.prompts.calibration import calibration_prompts, lopsided
from sasa_export.prompts.leak import asked, check_disjoint, grouped, split
from sasa_export.prompts.record import Record
from sasa_export.prompts.registry import LOADERS, NAMES, load, load_all

__all__ = [
    "LOADERS",
    "NAMES",
    "DataError",
    "Record",
    "asked",
    "calibration_prompts",
    "check_disjoint",
    "grouped",
    "load",
    "load_all",
    "lopsided",
    "split",
]
