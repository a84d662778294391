"""The files beside the weights that travel along: processor, tokenizer, chat template, generation settings."""

from __future__ import annotations

import shutil
from pathlib import Path

from sasa_export.models import Source

OWN = ("config.json", "model.safetensors.index.json", "README.md")
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")


def copy_files(source: Source, directory: Path) -> None:
    """Copy what the family's file names, and any licence."""
    for pattern in (*source.family.files, *LICENCES):
        for path in sorted(source.directory.glob(pattern)):
            if path.is_file() and path.name not in OWN and not path.name.startswith("sasa-"):
                shutil.copyfile(path, directory / path.name)
