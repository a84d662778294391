"""The pages under docs/reference/ are what `make api` writes."""

from pathlib import Path

import pytest
import write_api

DOCS = Path(__file__).parents[2] / "docs" / "reference"


@pytest.mark.parametrize("name", write_api.PAGES)
def test_the_pages_are_of_this_code(name: str) -> None:
    written = (DOCS / name).read_text(encoding="utf-8")
    assert written == write_api.PAGES[name](), "make api writes it again"
