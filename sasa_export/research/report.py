"""The one report layer of locate and evaluate: jinja2 for text, pandas for tables; pictures are drawn with theme.py."""

from __future__ import annotations

import base64
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sasa_export.flags import flag
from sasa_export.writers import card

if TYPE_CHECKING:
    import pandas as pd

TEMPLATES = Path(__file__).with_name("templates")
SPARE_BYTES = 20_000_000  # of any report
LEFT_OUT = ("model", "out", "force", "device")  # of a command line: said first, or no part of the result


def write_report(
    directory: Path, title: str, markdown: str, pictures: Mapping[str, bytes], name: str, figures: Any
) -> None:
    """Write report.md, report.html with the pictures in it, the pictures, and NAME.json with all `figures`."""
    for picture, content in pictures.items():
        (directory / f"{picture}.png").write_bytes(content)
    (directory / "report.md").write_text(markdown, encoding="utf-8")
    (directory / "report.html").write_text(html_page(title, markdown, pictures), encoding="utf-8")
    data = {"tool": f"sasa-export {version('sasa-export')}", **jsonable(figures)}
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    (directory / f"{name}.json").write_text(text, encoding="utf-8")


def render(template: str, **values: Any) -> str:
    """Text from a template beside this file. In Markdown, text of others goes through the filter `plain`."""
    return card.render(TEMPLATES, template, {"table": markdown_table, "plain": plain}, **values)


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


def jsonable(value: Any) -> Any:
    """Plain data, its numbers to six digits; of an estimate, all but its influence."""
    if is_dataclass(value):
        value = {name: part for name, part in vars(value).items() if name != "influence"}
    elif isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, dict):
        return {name: jsonable(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(part) for part in value]
    return round(value, 6) if isinstance(value, float) else value


def last_name(model: str) -> str:
    """A hub id as it is, and of a directory its name: where it lay is nobody's business."""
    return Path(model).resolve().name if Path(model).exists() else model


def made_with(name: str, options: Any) -> str:
    """The versions of what computes, and `sasa-export NAME` with the options (a dataclass) that differ from the
    defaults, to make a report again. The model and files go by their last names, and the output is `report`. Data is
    named as it was given.
    """
    parts = ["sasa-export", name, "--model", last_name(str(options.model))]
    for entry in fields(options):
        value = getattr(options, entry.name)
        if entry.name in LEFT_OUT or value == entry.default:
            continue
        if value is True:
            parts.append(flag(entry.name))
        else:
            for item in value if isinstance(value, tuple) else (value,):
                parts += [flag(entry.name), item.name if isinstance(item, Path) else str(item)]
    versions = ", ".join(f"{package} {version(package)}" for package in ("sasa-export", "torch", "transformers"))
    return f"`{shlex.join([*parts, '--out', 'report'])}`, {versions}"
