"""Which module imports which; the direction between packages is import-linter's (pyproject.toml)."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import pytest


def test_no_circle_of_modules() -> None:
    grimp = pytest.importorskip("grimp", reason="comes with import-linter")
    graph = grimp.build_graph("sasa_export", cache_dir=None)
    sorter = TopologicalSorter({module: graph.find_modules_directly_imported_by(module) for module in graph.modules})
    try:
        sorter.prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")
