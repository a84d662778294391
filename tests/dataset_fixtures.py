"""The miniature data sets, written once per session."""

from __future__ import annotations

from pathlib import Path

import miniature
import pytest


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The path of each data set. Tests copy it before they break it."""
    root = tmp_path_factory.mktemp("datasets")
    return {name: make(root / name) for name, make in miniature.MAKERS.items()}
