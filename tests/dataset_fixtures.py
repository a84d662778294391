"""Miniature data sets in the published layouts, and what loaders say of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import miniature
import pytest

from sasa_export.errors import SasaExportError
from sasa_export.prompts import load

MAKERS: dict[str, Callable[[Path], Path]] = {
    "mm-safetybench": miniature.mm_safetybench,
    "figstep": miniature.figstep,
    "vlguard": miniature.vlguard,
    "jailbreakv": miniature.jailbreakv,
    "xstest": miniature.xstest,
    "jsonl": miniature.jsonl,
}


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each data set, whole. Tests copy it before they break it."""
    root = tmp_path_factory.mktemp("datasets")
    return {name: make(root / name) for name, make in MAKERS.items()}


def message(spec: str) -> str:
    """What `load` complains about, in one line."""
    with pytest.raises(SasaExportError) as caught:
        load(spec)
    said = str(caught.value)
    assert len(said.splitlines()) == 1 and said.isprintable()
    return said
