"""The one report layer of locate and evaluate: jinja2 for text, pandas for tables; pictures are drawn with theme.py."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

TEMPLATES = Path(__file__).with_name("templates")


def render(template: str, **values: Any) -> str:
    """Text from a template beside this file. HTML templates (*.html.j2) escape what they are given; names that a
    template uses and nobody gave are errors. In Markdown, text of others goes through the filter `plain`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"table": markdown_table, "plain": plain}
    return environment.get_template(template).render(**values)


def markdown_table(frame: pd.DataFrame) -> str:
    """A table in Markdown, its columns' names as the head. Cells are written as they are; None is an empty one."""
    rows = [list(map(str, frame.columns)), ["---"] * len(frame.columns)]
    rows += [["" if cell is None else str(cell) for cell in row] for row in frame.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)


def plain(text: str) -> str:
    """Text that Markdown shows as it is, whatever signs it holds. `markdown_table` sees to the bars."""
    return re.sub(r"([\\`*\[\]<>&~]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", " ".join(text.split()))


def html_page(title: str, markdown: str, pictures: Mapping[str, bytes]) -> str:
    """A report in Markdown as one HTML page that loads nothing: the picture NAME.png of its text is put into it."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    for name, data in pictures.items():
        embedded = base64.b64encode(data).decode()
        body = body.replace(f'src="{name}.png"', f'src="data:image/png;base64,{embedded}"')
    return render("page.html.j2", title=title, body=body)
